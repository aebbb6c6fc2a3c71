"""One way to run a case, compiled, with its results in an order all share."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case

same = lambda tree: tree


class Program(NamedTuple):
    """`call()` runs and waits; `results(out)` are NumPy arrays: y, then gradients."""

    call: Callable[[], Any]
    results: Callable[[Any], list[np.ndarray]]
    compile_seconds: float | None
    temporary_bytes: int | None


@dataclasses.dataclass
class Candidate:
    """A JAX function `apply(params, x)`, with its own layout of params and x.

    Attributes:
      name: what the table calls it.
      apply: the model over all steps.
      to_native: reorders the common parameters, or their gradients, to `apply`'s.
      axes: where the common axes of x and y go, None for as they are.
      gradients_to_native: the same for gradients, where a parameter has a copy.
    """

    name: str
    apply: Callable[[Any, Any], Any]
    to_native: Callable[[Any], Any] = same
    axes: tuple[int, ...] | None = None
    gradients_to_native: Callable[[Any], Any] | None = None

    def compile(self, case: Case, of: str) -> Program:
        args = self._arguments(case, of)
        jax.clear_caches()  # What others have traced.
        start = time.perf_counter()
        run = jax.jit(self.apply if of == "forward" else _with_gradient(self.apply))
        program = run.lower(*args).compile()
        seconds = time.perf_counter() - start
        memory = program.memory_analysis()
        used = None if memory is None else int(memory.temp_size_in_bytes)
        call = lambda: jax.block_until_ready(program(*args))
        return Program(call, lambda out: self._results(out, of), seconds, used)

    def _arguments(self, case: Case, of: str) -> tuple:
        arrays = [case.x] if of == "forward" else [case.x, case.cotangent]
        moved = [self._move(a) for a in arrays]
        params = jax.tree.map(jnp.asarray, self.to_native(case.params))
        return jax.block_until_ready((params, *moved))

    def _move(self, a):
        return a if self.axes is None else jnp.transpose(a, self.axes)

    def _results(self, out, of: str) -> list[np.ndarray]:
        if of == "forward":
            return [self._common(out)]
        y, (of_params, of_x) = out
        params = jax.tree.leaves(of_params)
        return [self._common(y), self._common(of_x), *map(to_numpy, params)]

    def _common(self, a):
        if self.axes is not None:
            a = jnp.transpose(a, [int(axis) for axis in np.argsort(self.axes)])
        return to_numpy(a)

    def expected(self, common: list[Any]) -> list[np.ndarray]:
        """`[y]` or `[y, x's gradient, parameters' gradients]` in this one's order."""
        arrays, params = common[:2], common[2:]
        convert = self.gradients_to_native or self.to_native
        of_params = jax.tree.leaves(convert(params[0])) if params else []
        return [*map(to_numpy, arrays), *map(to_numpy, of_params)]


def to_numpy(a) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.float32), np.float64)


def _with_gradient(apply):
    def run(params, x, cotangent):
        y, pullback = jax.vjp(apply, params, x)
        return y, pullback(cotangent)

    return run
