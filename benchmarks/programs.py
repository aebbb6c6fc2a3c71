"""Programs that are one function of shared arguments, compiled and compared."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.candidate import Program, to_numpy
from benchmarks.measure import Effort, deviation, original, summary, take_turns

Row = dict[str, Any]


def measure_programs(
    about: Row,
    programs: dict[str, Any],
    args: tuple,
    effort: Effort,
    tol: float,
    want: list[np.ndarray] | None = None,
    others: tuple[str, ...] = (),
) -> list[Row]:
    """A row for each; ratios are to the first.

    Results must agree with `want`, by default those of the first, except those of
    `others`. A program is a function for `jax.jit`, or a `Program` of another library.
    """
    made = {
        name: program if isinstance(program, Program) else compiled(program, args)
        for name, program in programs.items()
    }
    rows = {}
    for name, program in made.items():
        got = program.results(program.call())
        want = want or got
        differs = None if name in others else deviation(name, got, want)
        if differs is not None and not differs <= tol:
            raise AssertionError(f"{name} differs by {differs:.1e} in {about}.")
        sizes = {
            "compile_seconds": program.compile_seconds,
            "temporary_bytes": program.temporary_bytes,
        }
        rows[name] = {**about, "deviation": differs, **sizes}
    seconds = take_turns({name: p.call for name, p in made.items()}, effort)
    base = statistics.median(next(iter(seconds.values())))
    return [
        {**rows[original(name)], "candidate": name, **summary(times, base)}
        for name, times in seconds.items()
    ]


def compiled(fun: Callable, args: tuple) -> Program:
    """A function under `jax.jit`, compiled for its arguments."""
    start = time.perf_counter()
    program = jax.jit(fun).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    used = None if memory is None else int(memory.temp_size_in_bytes)
    call = lambda: jax.block_until_ready(program(*args))
    results = lambda out: [to_numpy(leaf) for leaf in jax.tree.leaves(out)]
    return Program(call, results, seconds, used)
