"""The programs that are measured: a call, or a call and its gradient, compiled."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from tdjax._steps.axes import partition
from tdjax._steps.fold import watch_fold
from tdjax._tuning.candidates import Candidate
from tdjax._tuning.clock import device_of
from tdjax._tuning.deviations import is_float
from tdjax._tuning.independence import find_mixing


class Lowered(NamedTuple):
    """A program before its compilation, and the seconds that tracing took.

    `reason` says why it may not be taken: it folds, and examples may not be folded.
    """

    program: Any
    seconds: float
    reason: str | None


def lower(candidate: Candidate, run: Callable, args, mixing: list) -> Lowered:
    """Traces a candidate.

    Whether examples may be folded is found out for the first candidate that folds, and
    kept in `mixing`: it holds for blocks of any size.
    """
    start = time.perf_counter()
    # A block of one step is the same program under every method.
    folds = candidate.lowering.method == "fold" and candidate.lowering.chunk_size != 1
    if folds and not mixing:
        with watch_fold(lambda *fold: mixing.append(find_mixing(*fold))):
            program = jax.jit(run).lower(*args)
    else:
        program = jax.jit(run).lower(*args)
    reason = next(iter(mixing), "an unknown fold") if folds else None
    return Lowered(program, time.perf_counter() - start, reason)


def compile_lowered(lowered: Lowered, options: dict[str, Any]) -> tuple[Any, float]:
    """`(program, seconds)`, tracing included. It may run in any thread."""
    start = time.perf_counter()
    program = lowered.program.compile(compiler_options=options or None)
    return program, lowered.seconds + time.perf_counter() - start


# XLA's library fusions for CPUs, and an array of at least 7 axes.
_LIBRARY_FUSION = re.compile(r"calls=%?([\w.-]+).*__ynn_fusion")
_MANY_AXES = re.compile(r"\[\d+(?:,\d+){6,}\]")
# The first version of JAX whose fusions take them: jax-ml/jax issue 39257.
_FIRST_WITH_MANY_AXES = (0, 12)


def may_crash(program: Any) -> bool:
    """Whether a compiled program has a fusion that may end the process when it runs.

    On a CPU, the library fusions of some versions of XLA fail on arrays of 7 axes.
    """
    if jax.__version_info__ >= _FIRST_WITH_MANY_AXES:
        return False
    text = program.as_text() or ""
    fused = set(_LIBRARY_FUSION.findall(text))
    for computation in text.split("\n\n") if fused else ():
        name = computation.lstrip().removeprefix("%").split(" ", 1)[0]
        if name in fused and _MANY_AXES.search(computation):
            return True
    return False


def with_gradient(reference: Callable, argnums: list[int], args: tuple) -> tuple:
    """`(differentiate, args)`: `differentiate(apply)` gives results and gradients.

    The cotangents are random and passed as an argument, so that XLA can leave out no
    part of the backward pass.
    """
    cotangents = _random_like(reference, args)

    def differentiate(apply):
        def run(args, cotangents):
            chosen = [args[i] for i in argnums]
            primals, rebuild = partition(
                chosen, [*map(is_float, jax.tree.leaves(chosen))]
            )

            def floats_of(primals):
                values = dict(zip(argnums, rebuild(primals)))
                y = apply(*(values.get(i, x) for i, x in enumerate(args)))
                return _split_floats(jax.tree.leaves(y))

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
        with jax.default_device(device_of(args)):
            return draw()
    shardings = program.lower(*args).compile().output_shardings
    return jax.jit(draw, out_shardings=shardings)()


def _split_floats(leaves) -> tuple[list, list]:
    return [x for x in leaves if is_float(x)], [x for x in leaves if not is_float(x)]
