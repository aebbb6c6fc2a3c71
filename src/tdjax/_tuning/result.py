"""What `autotune` returns."""

import dataclasses
import itertools
import json
import math
import re
from typing import Any, Generic, TypeVar, cast

from tdjax._checks import describe
from tdjax._tuning.candidates import TUNED, Candidate, choose
from tdjax._tuning.report import rich_table
from tdjax._tuning.table import Options, enter, leave

T = TypeVar("T")


@dataclasses.dataclass
class Tuning(Generic[T]):
    """The result of `autotune`: of a function or layer, or of a whole model.

    As a context manager, it is what `method="auto"` looks its options up in:

        with result:
            y = model.apply(variables, x)

    A place, a call of a layer over time, is known by the layer and its attributes (a
    function: its name), the keywords, the shapes and dtypes of the inputs, the
    collections that it may write to, and the kind of device. `a | b` has the places of
    both, and b's where both have one.

    Attributes:
      tuned: the function, module or model with the chosen options; None if the result
        was loaded by `from_json` or merged, and in `places`.
      candidates: every lowering that was considered, with its `options`, `verdict`,
        `run_seconds` and `spread` (median and quartiles of a call), `ratio` and
        `ratio_spread` (median and quartiles, as a multiple of the default's time of the
        same moment), `rounds` (how many ratios), `best_ratio` (of the best times),
        `compile_seconds`, `temporary_bytes` (without arguments and results) and
        `deviation` (relative to the largest value). Of a whole model: as it was given,
        and tuned; empty if no place is better than as it was given.
      about: what was measured and where: device, versions, shapes, arguments.
      from_cache: whether the measurements were read from the cache, not made.
      finished: whether all candidates were tried and timed. If not, time ran out or the
        search was interrupted; with `cache=` the next call goes on with it.
      name: of the layer or function.
      key: what a context looks up.
      places: of a whole model or a merged result, a `Tuning` for each place, by name.
      failures: of a whole model, why places were not tuned, by name.
      best: the candidate that was chosen.
      options: its `method`, `chunk_size`, `unroll` and `remat`, as a dict of keyword
        arguments for `time_distributed` or a `TimeDistributed`. Of a whole model or a
        merged result, such a dict for each place, by name; none if the model is better
        as it was given.
      compiler_options: those of the best, to give `jax.jit`; empty without
        `compiler_options=` of `autotune`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> result = tdjax.autotune(jnp.sin, jnp.ones((2, 4, 3)), budget=1)
      >>> saved = result.to_json()
      >>> options = tdjax.Tuning.from_json(saved).options
      >>> sorted(options)
      ['chunk_size', 'method', 'remat', 'unroll']
      >>> tuned = tdjax.time_distributed(jnp.sin, **options)
      >>> with result | tdjax.Tuning.from_json(saved):
      ...     tdjax.time_distributed(jnp.sin, method="auto")(jnp.ones((2, 4, 3))).shape
      (2, 4, 3)
    """

    tuned: T
    candidates: list[Candidate]
    about: dict[str, Any]
    from_cache: bool = False
    finished: bool = True
    name: str = ""
    key: str = ""
    places: "dict[str, Tuning[Any]]" = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Candidate:
        """The candidate that was chosen."""
        if not self.candidates:
            places = ", ".join(self.places) or "none"
            raise ValueError(
                "best must be asked of a place here: a Tuning that was merged, or of a "
                "model of which no place is better than as it was given, has no "
                f"candidates of its own. .places has {places}."
            )
        return choose(self.candidates)

    @property
    def options(self) -> dict[str, Any]:
        """The chosen `method`, `chunk_size`, `unroll` and `remat`."""
        if self.key:
            return self.best.options
        return {name: place.options for name, place in self._places().items()}

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What to give `jax.jit` as `compiler_options`."""
        return dict(self.best.compiler_options) if self.candidates else {}

    def options_by_key(self) -> dict[str, Options]:
        """The options of all places, by what a context looks up."""
        return {
            place.key: place._without_compiler_options() for place in self.all_places()
        }

    def _without_compiler_options(self) -> Options:
        """The best options where the compiler has none: a table gives it none."""
        plain = [c for c in self.candidates if not c.compiler_options]
        if any(candidate.measured for candidate in plain):
            return choose(plain).options
        # All of them were dropped beside the options.
        ran = [c for c in plain if c.ratio is not None and not c.is_left]
        return min(ran, key=lambda c: c.ratio or math.inf, default=plain[0]).options

    def __enter__(self) -> "Tuning[T]":
        enter(self.options_by_key())
        return self

    def __exit__(self, *error: Any) -> None:
        leave(*error)

    def __or__(self, other: "Tuning[Any]") -> "Tuning[None]":
        if not isinstance(other, Tuning):
            return NotImplemented
        by_key = {
            place.key: place for place in (*self.all_places(), *other.all_places())
        }
        places: dict[str, Tuning[Any]] = {}
        for place in by_key.values():
            name = base = re.sub(r" \(\d+\)$", "", place.name)
            for number in itertools.count(2):
                if name not in places:
                    break
                name = f"{base} ({number})"
            places[name] = dataclasses.replace(place, name=name)
        finished = all(place.finished for place in places.values())
        return Tuning(None, [], {}, finished=finished, places=places)

    def all_places(self) -> "list[Tuning[Any]]":
        """Itself, or its places."""
        return [self] if self.key else [*self._places().values()]

    def _places(self) -> "dict[str, Tuning[Any]]":
        """Those of a model; none if it is better as it was given."""
        was_tried = any(c.lowering == TUNED and not c.is_left for c in self.candidates)
        return {} if was_tried and self.best.lowering != TUNED else self.places

    def show(self) -> None:
        """Prints a table of all candidates; of a whole model, one for each place.

        `rich.print(result)` does the same; docs/tuning.md explains the columns.
        """
        from rich.console import Console

        Console().print(self)

    def __rich__(self):
        from rich.console import Group
        from rich.markup import escape

        if self.key:
            return self._table()
        tables = [place.__rich__() for place in self.places.values()]
        failures = [f"{name}: not tuned: {why}" for name, why in self.failures.items()]
        own = [self._table()] if self.candidates else []
        if self.about and not own:
            are_better = any(not p.best.is_default for p in self.places.values())
            if are_better:
                own = [f"{self.name}: interrupted before the whole was compared."]
            elif self.finished:
                own = [f"{self.name}: stays as it was given; no place is better."]
            own = [*map(escape, own)]
        return Group(*tables, *map(escape, failures), *own)

    def _table(self):
        what = "forward" if self.about["argnums"] == [] else "forward and gradient"
        what = f"{self.name}: {what}" if self.name else what
        title = f"{what} on {self.about['device']}, JAX {self.about['jax']}"
        # What is left to do in a place is said there.
        finished = self.finished or any(not p.finished for p in self.places.values())
        is_model = not self.key
        return rich_table(self.candidates, self.best, title, finished, is_model)

    def __repr__(self):
        state = "measured" if self.finished else "measured, unfinished"
        if not self.key:
            return f"Tuning({len(self.places)} places {state})"
        timed = sum(c.run_seconds is not None for c in self.candidates)
        return f"Tuning({self.best}; {timed} of {len(self.candidates)} {state})"

    def to_json(self) -> str:
        """Everything but `tuned`, as JSON; an infinite deviation is null."""
        return json.dumps(self._as_json(), indent=1, allow_nan=False)

    def _as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "options": self.options,
            "compiler_options": self.compiler_options,
            "from_cache": self.from_cache,
            "finished": self.finished,
            "key": self.key,
            "about": self.about,
            "candidates": [candidate.as_json() for candidate in self.candidates],
            "places": {name: p._as_json() for name, p in self.places.items()},
            "failures": self.failures,
        }

    @classmethod
    def from_json(cls, text: str) -> "Tuning[Any]":
        """Reads what `to_json` wrote.

        Args:
          text: JSON; of a file, what is in it.

        Returns:
          A `Tuning` whose `tuned` is None.

        Raises:
          TypeError: if `text` is no text, but a path, say.
          ValueError: if `text` is not what `to_json` of this version writes.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a str of JSON, got {describe(text)}. Of a file, give "
                "the text in it: pathlib.Path(path).read_text()."
            )
        try:
            return cls._from_json(json.loads(text, parse_constant=_refuse_constant))
        except (
            AttributeError, LookupError, RecursionError, TypeError, ValueError
        ) as error:  # fmt: skip
            raise ValueError(
                "text must be all that Tuning.to_json of this version writes, got "
                f"{str(text)[:80]!r} ({type(error).__name__}: {error}). Of a file, "
                "give the text in it: pathlib.Path(path).read_text(). If this is it, "
                "the file is damaged, or of another version."
            ) from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> "Tuning[Any]":
        candidates = [Candidate.from_json(c) for c in content["candidates"]]
        of_places = content["places"].items()
        tuning = cls(
            cast(T, None),
            candidates,
            dict(content["about"]),
            bool(content["from_cache"]),
            bool(content["finished"]),
            str(content["name"]),
            str(content["key"]),
            {str(name): cls._from_json(fields) for name, fields in of_places},
            {str(name): str(why) for name, why in content["failures"].items()},
        )
        if tuning.key and not any(candidate.measured for candidate in candidates):
            raise ValueError("it must hold a candidate that was measured, got none")
        return tuning


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a finite number")
