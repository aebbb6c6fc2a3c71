"""`tdjax.tuning`: a file of options that grows while functions are traced."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax.core

from tdjax._checks import describe, warn
from tdjax._steps import places
from tdjax._steps.lowering import Lowering
from tdjax._steps.places import Place
from tdjax._tuning.autotune import tune
from tdjax._tuning.cache import locked, read_text, reason_of, write_atomically
from tdjax._tuning.model import gradient_of_all, with_arrays
from tdjax._tuning.processes import agreed_text, is_first
from tdjax._tuning.result import Tuning
from tdjax._tuning.settings import Settings
from tdjax._tuning.table import Table, entered, run_with

T = TypeVar("T")


@contextlib.contextmanager
def tuning(
    path: str | os.PathLike[str],
    *,
    budget: int | float = 10.0,
    gradient: bool = True,
    memory_limit: int | None = None,
) -> Iterator[None]:
    """Looks up the options of `method="auto"` in a file, and tunes what is missing.

    While a function is traced (under `jax.jit`, say), each call with `method="auto"`
    is looked up by its layer, shapes and device. What the file does not have is tuned
    there and then, on random arrays of the traced shapes, and written to the file at
    once. So the first trace takes long, later ones take what is known; what is not
    finished goes on in the next process. Several processes and threads can share a
    file. The arrays of one call need memory beside what your program holds.

    Args:
      path: a file as `Tuning.to_json` writes it; it need not exist. Give training and
        inference a file each: a call can't tell whether it will be differentiated.
      budget: seconds for each place that is tuned.
      gradient: whether the call and its gradient are timed together, or the call alone.
      memory_limit: as in `tdjax.autotune`, for each place.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if `budget` is not positive, the file holds something else, or it is a
        folder.

    Warns:
      UserWarning: if a place can't be tuned by itself, or the file can't be written.

    Example:
      >>> import jax, jax.numpy as jnp, os, tdjax, tempfile
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> head = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), method="auto")
      >>> path = os.path.join(tempfile.mkdtemp(), "training.json")
      >>> with tdjax.tuning(path, budget=1):
      ...     y = jax.jit(head)(params, jnp.ones((2, 4, 3)))
      >>> y.shape, os.path.exists(path)
      ((2, 4, 5), True)
    """
    file = _path(path)
    settings = Settings(None, budget, memory_limit, None, None, None)
    if not isinstance(gradient, bool):
        raise TypeError(f"gradient must be a bool, got {describe(gradient)}.")
    known = _read(file)
    with entered(_OnMiss(file, known, settings, gradient)):
        yield


_numbers = itertools.count()
# The files and keys of places that this process has tuned.
_tuned_here: set[tuple[Path, str]] = set()


class _OnMiss(Table):
    """A table that grows. To JAX's caches, that of the same file is the same."""

    def __init__(self, file: Path, known: Tuning, settings: Settings, gradient: bool):
        outer = places.in_effect.value
        super().__init__(known.options_by_key(), outer=outer)
        self._file, self._known = file.absolute(), known
        # What another process has not finished is gone on with here.
        unfinished = [place for place in known.all_places() if not place.finished]
        self._earlier = {
            p.key: p for p in unfinished if (self._file, p.key) not in _tuned_here
        }
        for key in self._earlier:
            self.of_auto.pop(key, None)
        self._in_file = dict(self.of_auto)
        self._settings, self._gradient = settings, gradient
        self._failed, self._number = set[str](), next(_numbers)
        limits = settings.budget, settings.memory_limit, gradient
        self._same = self._file, *limits, outer

    def run_unknown(self, key: str, place: Place, run: Callable[[Lowering], T]) -> T:
        if place.lowering.method != "auto":
            return super().run_unknown(key, place, run)
        if key in self._failed:
            return super().run_unknown(key, place, run)
        try:
            result = self._tune(place, self._earlier.get(key))
        except Exception as error:
            # The call may still work: it is not run on other arrays, outside of all.
            if key in self._earlier:
                self.of_auto |= self._earlier[key].options_by_key()
                return self.run(place, run)
            self._failed.add(key)
            line = (str(error).splitlines() or [""])[0]
            warn(
                f"{place.name} can't be tuned by itself, and is called as without a "
                f"table: {type(error).__name__}: {line}",
            )
            return super().run_unknown(key, place, run)
        self.of_auto[key] = result.options
        self._known = self._known | result
        _tuned_here.add((self._file, key))
        if not is_first() or _add(self._file, result, self._known):
            self._in_file[key] = result.options
        if self._settings.interrupted.is_set():
            # What was known is kept; the program that is being traced ends.
            self._settings.interrupted.clear()
            raise KeyboardInterrupt
        return run_with(result.options, place, run)

    def _tune(self, place: Place, earlier: Tuning | None) -> Tuning:
        # Outside of the program that is being traced. `jax.ensure_compile_time_eval`
        # would fold constants in the programs here, and so give others.
        with jax.core.eval_context(), places.in_effect(self.outer):
            settings = self._settings
            whole = with_arrays(place)
            if self._gradient:
                settings = dataclasses.replace(settings, argnums=gradient_of_all(whole))
            return tune(whole, lambda lowering: None, settings, earlier)

    # The same file is the same program, entered again, as long as it only grows.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _OnMiss) or self._same != other._same:
            return False
        before, after = sorted((self, other), key=lambda table: table._number)
        return before._in_file.items() <= after.of_auto.items()

    def __hash__(self) -> int:
        return hash(self._same)


def _path(path: str | os.PathLike[str]) -> Path:
    is_path = isinstance(path, str | os.PathLike)
    text = os.fsdecode(path) if is_path else ""
    if not text or "\0" in text:
        raise TypeError(f"path must be that of a file, got {path!r}.")
    if os.path.isdir(text):
        raise ValueError(
            f"path must be that of a file, got the folder {text!r}. Give it a file's "
            "name in there, such as 'training.json'."
        )
    return Path(text)


def _read(file: Path) -> Tuning:
    """What the file holds; nothing if there is none."""
    text = None
    if is_first() and file.exists():
        with contextlib.suppress(UnicodeDecodeError):
            text = read_text(file)
        text = text or ""
    text = agreed_text(text)
    try:
        return Tuning(None, [], {}) if text is None else Tuning.from_json(text)
    except ValueError as error:
        raise ValueError(
            f"path must be a file that Tuning.to_json wrote, got {str(file)!r} with "
            "something else. Give another path, or delete the file."
        ) from error


def _add(file: Path, result: Tuning, known: Tuning) -> bool:
    """Adds a result to what others have written meanwhile; whether that went well.

    `known` is for a file that is not there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent):
            written = Tuning.from_json(read_text(file)) if file.exists() else known
            same = [p for p in written.all_places() if p.key == result.key]
            if result.finished or not any(place.finished for place in same):
                written = written | result
            write_atomically(file, written.to_json())
        return True
    except (OSError, ValueError) as error:
        warn(f"The file {str(file)!r} can't be written: {reason_of(error)}.")
        return False
