"""Measure the lowerings on this device, and pick the fastest that agrees."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tdjax._checks import describe
from tdjax._steps.axes import flatten_inputs, time_size
from tdjax._steps.transform import time_distributed
from tdjax._tuning import cache as cache_file
from tdjax._tuning.candidates import (
    Candidate,
    default_options,
    is_float,
    make_options,
    options_from,
    with_gradient,
)
from tdjax._tuning.report import progress_bar, rich_table
from tdjax._tuning.search import Limits, choose, measure_all


@dataclasses.dataclass
class Tuning:
    """What `autotune` found.

    Attributes:
      tuned: the function or module with the best options.
      candidates: every lowering that was considered, with its measurements.
      about: what was measured and where: device, versions, shapes, arguments.
      from_cache: whether the measurements were read from a file, not made.
    """

    tuned: Any
    candidates: list[Candidate]
    about: dict[str, Any]
    from_cache: bool = False

    @property
    def best(self) -> Candidate:
        """The candidate that was chosen."""
        return choose(self.candidates)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `time_distributed` that were chosen."""
        return dict(self.best.options)

    def show(self) -> None:
        """Prints the table of all candidates.

        Raises:
          ImportError: if Rich is not installed (`pip install "tdjax[tuning]"`).
        """
        try:
            from rich.console import Console
        except ImportError as error:
            raise ImportError(
                'show() prints with Rich: pip install "tdjax[tuning]". to_json() has '
                "the same figures."
            ) from error
        Console().print(self)

    def __rich__(self):
        what = "forward" if self.about["argnums"] == [] else "forward and gradient"
        title = f"{what} on {self.about['device']}, JAX {self.about['jax']}"
        return rich_table(self.candidates, self.best, title)

    def __repr__(self):
        timed = sum(each.run_seconds is not None for each in self.candidates)
        return f"Tuning({self.best}; {timed} of {len(self.candidates)} measured)"

    def to_json(self) -> str:
        """All figures as JSON: times in seconds, memory in bytes."""
        fields = {
            "options": self.options,
            "from_cache": self.from_cache,
            "about": self.about,
            "candidates": [each.as_json() for each in self.candidates],
        }
        return json.dumps(fields, indent=1, allow_nan=False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `autotune` that say how to search."""

    argnums: int | Sequence[int] | None = None
    budget: int | float = 30.0
    memory_limit: int | None = None
    tolerance: int | float | None = None
    candidates: Sequence[Mapping[str, Any]] | None = None
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self):
        for name in ("budget", "memory_limit", "tolerance"):
            value = getattr(self, name)
            if value is not None or name == "budget":
                _require_positive(name, value)
        if self.cache is not None and not _is_path(self.cache):
            raise TypeError(f"cache must be the path of a file, got {self.cache!r}.")

    def positions(self, args: tuple) -> list[int]:
        """Which arguments to differentiate by, counted from the front."""
        if self.argnums is None:
            return []
        argnums = self.argnums if isinstance(self.argnums, Sequence) else [self.argnums]
        if not argnums:
            raise ValueError("argnums must name an argument; None is for no gradient.")
        for i in argnums:
            whole = isinstance(i, int) and not isinstance(i, bool)
            if not whole or not -len(args) <= i < len(args):
                raise ValueError(
                    f"argnums must be positions of the {len(args)} argument(s), got "
                    f"{self.argnums!r}."
                )
        chosen = sorted({i % len(args) for i in argnums})
        for i in chosen:
            if not any(map(is_float, jax.tree.leaves(args[i]))):
                raise ValueError(
                    f"argnums={self.argnums!r} must point at floating point arguments, "
                    f"got {describe(args[i])} at {i}."
                )
        return chosen

    def listing(self, timesteps: int, own: dict[str, Any]) -> list[Candidate]:
        """The candidates: the reference, the module's own options, the others."""
        if self.candidates is None:
            others = default_options(timesteps, with_remat=self.argnums is not None)
        else:
            others = [options_from(each) for each in self.candidates]
        # By their text: True == 1, and means another thing.
        options = {repr(each): each for each in (make_options(), own, *others)}.values()
        blocks = lambda size: math.ceil(timesteps / (size or timesteps))
        return [Candidate(each, blocks(each["chunk_size"])) for each in options]


def autotune(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any = 1,
    out_axes: Any = 1,
    argnums: int | Sequence[int] | None = None,
    budget: int | float = 30.0,
    memory_limit: int | None = None,
    tolerance: int | float | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    cache: str | os.PathLike[str] | None = None,
    capacity: int | None = None,
    mask: Any = None,
) -> Tuning:
    """Finds the fastest lowering of `time_distributed(fun)` for these inputs.

    Compiles lowerings (`method`, `chunk_size`, `unroll`, `remat`), compares the results
    of each with those of `method="vmap"`, and times those that agree, in turn, on the
    device where JAX puts the inputs. A lowering that is far behind is dropped early;
    one that gives other numbers is refused, and the table says so. If two are as fast
    (within 2 %), the one with less memory is taken. On a terminal a progress bar is
    shown, if Rich is installed.

    Args:
      fun: the function of one step; give it keyword arguments by `functools.partial`.
      *args: its arguments with their time axes: arrays of the shapes and dtypes that
        the program will see. Better real data than constants, by which the results of
        a wrong lowering may look right; a constant array of floats that is mapped
        over is replaced by random numbers.
      in_axes: the time axis of the arguments, as in `time_distributed`.
      out_axes: the time axis of the results.
      argnums: None to time the call alone; or the position(s) of the arguments, as in
        `jax.grad`, by which the results are differentiated, to time the call and the
        gradient together.
      budget: seconds for everything. A compilation that has begun is finished, but one
        that is not expected to end in time is not begun.
      memory_limit: bytes of temporary memory that the compiled program may use, by
        XLA's own analysis (inputs and results not counted).
      tolerance: the largest deviation from the reference, relative to the largest
        value of the same result; by default 2e-4 for float32 on CPU and 3e-2 where
        matrix units may round, 1e-10 for float64; for bfloat16 (3e-2) and float16
        (5e-3) at least twice the reference's own deviation from single precision.
      candidates: the options to try instead of the default list, each a mapping of
        options of `time_distributed`. The reference is measured too.
      cache: a file to keep results in, for any number of functions and processes; a
        lock file lies beside it. They are found again for the same function, shapes,
        device, versions and arguments of this call, `budget` among them.
      capacity: as in `time_distributed`; `.tuned` has it too.
      mask: the mask of the calls, `(batch, time)`, as `.tuned` will be called with.

    Returns:
      A `Tuning`: `.tuned` is `time_distributed(fun)` with the best options, `.options`
      are these, `.show()` prints all candidates and `.to_json()` gives them.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if a number is out of range, or no lowering was found within
        `memory_limit`. What `fun` itself raises under the reference is raised as is.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> x = jnp.ones((2, 4, 3))
      >>> result = tdjax.autotune(tdjax.dense, params, x, in_axes=(None, 1), budget=1)
      >>> result.tuned(params, x).shape
      (2, 4, 5)
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {describe(fun)}.")
    make = lambda options: time_distributed(
        fun, in_axes=in_axes, out_axes=out_axes, capacity=capacity, **options
    )
    run = lambda options: functools.partial(make(options), mask=mask)
    settings = Settings(argnums, budget, memory_limit, tolerance, candidates, cache)
    args, timesteps = prepare_inputs(args, in_axes)
    if capacity is not None:
        timesteps = capacity
    return tune(run, make, args, timesteps, settings)


def tune(
    run: Callable[[dict[str, Any]], Callable],
    make: Callable[[dict[str, Any]], Any],
    args: tuple,
    timesteps: int,
    settings: Settings,
    own: Mapping[str, Any] | None = None,
) -> Tuning:
    """Measures `run(options)(*args)`; the result holds `make(options)`."""
    args = jax.tree.map(jnp.asarray, args)
    limits = Limits(settings.budget, settings.memory_limit, settings.tolerance)
    candidates = settings.listing(timesteps, make_options(**(own or {})))
    argnums = settings.positions(args)
    about = _about(run(make_options()), args, argnums, candidates, limits)
    path = None if settings.cache is None else Path(settings.cache)
    found = path and cache_file.load(path, about)
    if found:
        return Tuning(make(choose(found).options), found, about, from_cache=True)
    _measure(candidates, run, args, argnums, limits)
    if path is not None:
        cache_file.store(path, about, candidates)
    return Tuning(make(choose(candidates).options), candidates, about)


def prepare_inputs(args: tuple, in_axes: Any) -> tuple[tuple, int]:
    """`(args, timesteps)`, with numbers that tell a right lowering from a wrong one.

    An array that is the same everywhere, as `jnp.ones` is, has the mean over its batch
    that each example has; such a one gets random numbers instead.
    """
    for x in jax.tree.leaves(args):
        if isinstance(x, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                "autotune runs the function, so its arguments must be arrays, outside "
                f"of jit, got {describe(x)}."
            )
    inputs = flatten_inputs(args, in_axes)
    if time_size(inputs) < 1:
        raise ValueError("args must have steps to measure, got 0 steps.")
    varied = [_vary(jnp.asarray(x), i) for i, x in enumerate(inputs.mapped)]
    return inputs.rebuild(varied), time_size(inputs)


def _vary(x, seed: int):
    if not is_float(x) or x.size < 2 or not (x == x.ravel()[0]).all():
        return x
    return jax.random.normal(jax.random.key(seed), x.shape, x.dtype)


def _measure(candidates, run, args, argnums, limits: Limits) -> None:
    program_of = run
    if argnums:
        differentiate, args = with_gradient(run(make_options()), argnums, args)
        program_of = lambda options: differentiate(run(options))
    with progress_bar(len(candidates)) as report:
        measure_all(candidates, program_of, args, limits, report)
    if not any(each.measured for each in candidates):
        used = [each.temporary_bytes for each in candidates if each.temporary_bytes]
        raise ValueError(
            f"memory_limit={limits.memory_limit} bytes is less than every lowering "
            f"needs that was tried within budget={limits.budget} s; the least was "
            f"{min(used, default=None)} bytes."
        )


def _about(reference, args, argnums, candidates, limits: Limits) -> dict[str, Any]:
    """What the measurements depend on, as JSON has it."""
    device = _device(args)
    about = {
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "cores": os.cpu_count() if device.platform == "cpu" else None,
        "jax": jax.__version__,
        "tdjax": importlib.metadata.version("tdjax"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "precision": getattr(jax.config, "jax_default_matmul_precision", None),
        "shapes": [str(jax.typeof(x)) for x in jax.tree.leaves(args)],
        "program": _fingerprint(reference, args),
        "argnums": argnums,
        "candidates": [each.options for each in candidates],
        "budget": limits.budget,
        "memory_limit": limits.memory_limit,
        "tolerance": limits.tolerance,
    }
    return json.loads(json.dumps(about))


def _device(args) -> Any:
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    devices = sorted(arrays[0].devices(), key=lambda d: d.id) if arrays else []
    return devices[0] if devices else jax.devices()[0]


def _fingerprint(reference, args) -> str:
    # Functions inside of a jaxpr are printed with their addresses.
    program = re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(reference)(*args)))
    return hashlib.sha256(program.encode()).hexdigest()


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and os.fspath(value) not in ("", b"")


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {describe(value)}.")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
