"""Programs that are one function of shared arguments, compiled and compared."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Effort, deviation, take_turns

Row = dict[str, Any]


def measure_programs(
    about: Row, programs: dict[str, Any], args: tuple, effort: Effort, tol: float
) -> list[Row]:
    """A row for each; results must agree with the first's, ratios are to the first.

    A program is a function for `jax.jit`, or a `Program` of another library.
    """
    made = {
        name: program if isinstance(program, Program) else Compiled(program, args)
        for name, program in programs.items()
    }
    want: list[np.ndarray] = []
    rows = []
    for name, program in made.items():
        got = program.results(program.call())
        want = want or got
        differs = deviation(name, got, want)
        if not differs <= tol:
            raise AssertionError(f"{name} differs by {differs:.1e} in {about}.")
        sizes = {
            "compile_seconds": program.compile_seconds,
            "temporary_bytes": program.temporary_bytes,
        }
        rows.append({**about, "candidate": name, "deviation": differs, **sizes})
    seconds = take_turns({name: p.call for name, p in made.items()}, effort)
    base = statistics.median(next(iter(seconds.values())))
    for row, times in zip(rows, seconds.values()):
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        row["ratio"], row["seconds"] = median / base, median
        row["quartiles"] = [low / base, high / base]
    return rows


class Program:
    """`call()` runs and waits; `results(out)` are arrays, in the order of JAX's."""

    compile_seconds: float | None = None
    temporary_bytes: int | None = None

    def call(self) -> Any:
        raise NotImplementedError

    def results(self, out) -> list[np.ndarray]:
        raise NotImplementedError


class Compiled(Program):
    """A function under `jax.jit`, compiled for its arguments."""

    def __init__(self, fun: Callable, args: tuple):
        start = time.perf_counter()
        self._program = jax.jit(fun).lower(*args).compile()
        self._args = args
        self.compile_seconds = time.perf_counter() - start
        memory = self._program.memory_analysis()
        self.temporary_bytes = memory and int(memory.temp_size_in_bytes)

    def call(self):
        return jax.block_until_ready(self._program(*self._args))

    def results(self, out) -> list[np.ndarray]:
        return [
            np.asarray(jnp.asarray(leaf, jnp.float32)) for leaf in jax.tree.leaves(out)
        ]
