"""Candidates: the lowerings to try, their programs, and how results are compared."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from tdjax._mesh import like_type_of
from tdjax._steps.fold import watch_fold
from tdjax._steps.lowering import METHODS, Lowering
from tdjax._tuning.independence import find_mixing

OPTIONS = ("method", "chunk_size", "unroll", "remat")
# A straight line of more blocks than this takes too long to compile to be tried.
_LONGEST_LINE = 32
# The largest deviation from the reference, relative to its largest value. Another order
# of summation causes errors that grow with the square root of the number of terms.
_TOLERANCES = {"float64": 1e-10, "float32": 2e-4, "float16": 5e-3, "bfloat16": 3e-2}
# Matrix units may round the factors of float32 products to 10 bits, or to 7.
_MATRIX_UNIT_TOLERANCE = 3e-2


@dataclasses.dataclass
class Candidate:
    """A lowering and what was measured of it.

    Attributes:
      lowering: how the steps are compiled.
      blocks: the number of blocks of steps.
      verdict: `"measured"`; `"behind"` if too slow to be measured as often as the
        others; or why it was refused or not tried.
      compile_seconds: the time of tracing and compilation.
      run_seconds, spread: the time of one call, median and quartiles.
      temporary_bytes: the compiled program's memory for temporaries, without inputs
        and outputs.
      deviation: the largest difference from the reference, relative to the largest
        value of the result where it occurs.
    """

    lowering: Lowering
    blocks: int = 1
    verdict: str = "not tried"
    compile_seconds: float | None = None
    run_seconds: float | None = None
    spread: tuple[float, float] | None = None
    temporary_bytes: int | None = None
    deviation: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Its `method`, `chunk_size`, `unroll` and `remat`."""
        return {name: getattr(self.lowering, name) for name in OPTIONS}

    @property
    def measured(self) -> bool:
        """Whether it agrees with the reference and was timed."""
        return self.verdict == "measured"

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them; an infinite deviation is None."""
        names = [field.name for field in dataclasses.fields(self)][1:]
        fields = {"options": self.options} | {
            name: getattr(self, name) for name in names
        }
        if self.deviation is not None and not math.isfinite(self.deviation):
            fields["deviation"] = None
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Candidate":
        """Reads what `as_json` wrote, field by field: it may come from anywhere."""
        if set(fields["options"]) != set(OPTIONS):
            raise ValueError(f"a candidate has the options {fields['options']}")
        spread = fields["spread"]
        candidate = cls(
            Lowering(**fields["options"]),
            _number(int, fields["blocks"]),
            str(fields["verdict"]),
            _number(float, fields["compile_seconds"]),
            _number(float, fields["run_seconds"]),
            spread and (_number(float, spread[0]), _number(float, spread[1])),
            _number(int, fields["temporary_bytes"]),
            _number(float, fields["deviation"]),
        )
        if candidate.measured and not candidate.run_seconds:
            raise ValueError("a candidate was measured and has no time")
        return candidate

    def __str__(self):
        plain = Candidate(Lowering()).options
        # Compared by their text: True == 1, and means another thing.
        shown = {k: v for k, v in self.options.items() if repr(v) != repr(plain[k])}
        shown = {"method": self.lowering.method, **shown}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


def _number(kind: type, value: Any) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1e300:
        raise ValueError(f"a candidate holds {value!r:.40} in the place of a number")
    return kind(value)


def list_candidates(
    base: Lowering, timesteps: int, with_remat: bool, given: Any
) -> list[Candidate]:
    """The candidates: the reference, `base` itself, then those given or the default.

    What `base` fixes besides the four options (`axis_name`, say) all of them have.
    """
    if given is None:
        lowerings = _default_lowerings(base, timesteps, with_remat)
    else:
        lowerings = [_change(base, **_checked(options)) for options in given]
    # Compared by their text: True == 1, and means another thing.
    lowerings = {repr(x): x for x in (_change(base), base, *lowerings)}.values()
    blocks = lambda size: math.ceil(timesteps / (size or timesteps))
    return [Candidate(x, blocks(x.chunk_size)) for x in lowerings]


def _default_lowerings(
    base: Lowering, timesteps: int, with_remat: bool
) -> list[Lowering]:
    """The lowerings to try, the likely ones first."""
    # A few large blocks first: they compile fast, and are often nearly the best.
    sizes = [timesteps // n for n in (4, 8, 2, 16, 64)] + [1]
    sizes = [size for size in dict.fromkeys(sizes) if 0 < size < timesteps]
    options: list[dict[str, Any]] = [{"method": method} for method in METHODS]
    remats = []
    for size in sizes:
        # A block of one step is the same program under every method.
        for method in ("fold", "vmap") if size > 1 else ("vmap",):
            block = {"method": method, "chunk_size": size}
            if math.ceil(timesteps / size) <= _LONGEST_LINE:
                options.append({**block, "unroll": True})
            options.append(block)
            remats.append({**block, "remat": True})
    options += remats if with_remat else []
    return [_change(base, **given) for given in options if _is_possible(base, given)]


def _is_possible(base: Lowering, options: dict[str, Any]) -> bool:
    """Named time axes need vmap, and `axis_name` all steps at once."""
    if options["method"] != "vmap":
        return base.axis_name is None and base.spmd_axis_name is None
    return "chunk_size" not in options or base.axis_name is None


def _checked(options: Any) -> Mapping[str, Any]:
    """One of the user's `candidates`."""
    if not isinstance(options, Mapping) or not set(options) <= set(OPTIONS):
        raise TypeError(
            f"candidates must be mappings with the keys {', '.join(OPTIONS)}, got "
            f"{options!r}."
        )
    return options


def _change(
    base: Lowering,
    method: Any = "vmap",
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
) -> Lowering:
    """`base` with other options; without arguments, the reference."""
    return dataclasses.replace(
        base, method=method, chunk_size=chunk_size, unroll=unroll, remat=remat
    )


def compile_candidate(
    candidate: Candidate, run: Callable, args, mixing: list[str | None]
) -> tuple[Any, str | None]:
    """`(program, reason)`: compiles a candidate and notes its time and memory.

    The reason says why examples may not be folded. It is found out for the first
    candidate that folds, and kept in `mixing`: it holds for blocks of any size.
    """
    start = time.perf_counter()
    # A block of one step is the same program under every method.
    folds = candidate.lowering.method == "fold" and candidate.lowering.chunk_size != 1
    if folds and not mixing:
        with watch_fold(lambda *fold: mixing.append(find_mixing(*fold))):
            lowered = jax.jit(run).lower(*args)
    else:
        lowered = jax.jit(run).lower(*args)
    program = lowered.compile()
    candidate.compile_seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    if memory is not None:
        candidate.temporary_bytes = int(memory.temp_size_in_bytes)
    return program, next(iter(mixing), "an unknown fold") if folds else None


def timed(program, args, calls: int = 1) -> tuple[float, Any]:
    """Seconds per call, and the result of the last call."""
    y = None
    start = time.perf_counter()
    for _ in range(calls):
        y = program(*args)
    jax.block_until_ready(y)
    return (time.perf_counter() - start) / calls, y


def with_gradient(reference: Callable, argnums: list[int], args: tuple) -> tuple:
    """`(differentiate, args)`: `differentiate(apply)` gives results and gradients.

    The cotangents are random and passed as an argument, so that XLA can leave out no
    part of the backward pass.
    """
    cotangents = _random_like(reference, args)

    def differentiate(apply):
        def run(args, cotangents):
            leaves, treedef = jax.tree.flatten([args[i] for i in argnums])

            def floats_of(primals):
                values = dict(zip(argnums, treedef.unflatten(_merge(leaves, primals))))
                y = apply(*(values.get(i, x) for i, x in enumerate(args)))
                return _split_floats(jax.tree.leaves(y))

            primals, _ = _split_floats(leaves)
            floats, pullback, others = jax.vjp(floats_of, primals, has_aux=True)
            return floats, others, pullback(cotangents)

        return run

    return differentiate, (args, cotangents)


def _random_like(reference: Callable, args: tuple) -> list:
    """Random numbers for each float of the result, on the devices of the result."""
    program = jax.jit(lambda *args: _split_floats(jax.tree.leaves(reference(*args)))[0])
    shapes = jax.eval_shape(program, *args)

    def draw():
        keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
        normal = lambda i, y: jax.random.normal(keys[i], y.shape, y.dtype)
        return list(map(normal, range(len(shapes)), shapes))

    if not any(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(args)):
        return draw()
    shardings = program.lower(*args).compile().output_shardings
    return jax.jit(draw, out_shardings=shardings)()


def widen(tree):
    """Half precision floats in single precision, all else as it is."""
    half = lambda x: is_float(x) and x.dtype.itemsize == 2
    return jax.tree.map(lambda x: x.astype(jnp.float32) if half(x) else x, tree)


def is_float(x) -> bool:
    """Whether it can be differentiated: real or complex."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _split_floats(leaves) -> tuple[list, list]:
    return [x for x in leaves if is_float(x)], [x for x in leaves if not is_float(x)]


def _merge(leaves, floats) -> list:
    fill = iter(floats)
    return [next(fill) if is_float(x) else x for x in leaves]


@jax.jit
def deviations(got, want):
    """For each leaf, the largest difference relative to its largest finite value."""
    return jax.tree.map(_deviation, got, want)


def _deviation(got, want):
    got = like_type_of(got, want)
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if want.size == 0:
        return jnp.zeros(())
    if not is_float(want):
        return jnp.where(jnp.array_equal(got, want), 0.0, jnp.inf)
    same = (got == want) | (jnp.isnan(got) & jnp.isnan(want))
    finite = jnp.isfinite(want)
    scale = jnp.max(jnp.abs(jnp.where(finite, want, 0)))
    error = jnp.abs(jnp.where(finite, got - want, jnp.inf)) / jnp.maximum(scale, 1e-30)
    return jnp.max(jnp.where(same, 0, jnp.where(jnp.isnan(error), jnp.inf, error)))


def default_tolerance(dtype) -> float:
    """The deviation that another order of summation may cause."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    name = jnp.finfo(dtype).dtype.name  # of a complex number's parts
    tolerance = _TOLERANCES.get(name, _MATRIX_UNIT_TOLERANCE)
    if name == "float32" and jax.default_backend() != "cpu":
        return max(tolerance, _MATRIX_UNIT_TOLERANCE)
    return tolerance
