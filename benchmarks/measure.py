"""Compile all, check all against each other, then time them in turn."""

import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import peers
from benchmarks.candidate import Candidate, Program
from benchmarks.cases import Case

# A shorter measurement would be one of the clock and of the scheduler.
_SHORTEST = 5e-3
# Relative to the largest value; sums of thousands of products, in another order.
TOLERANCES = {"float32": 5e-4, "bfloat16": 6e-2}
_MATRIX_UNITS = 3e-2  # float32 products on an accelerator


# The first of each case is timed twice: the ratio of the two is the noise.
AGAIN = ", again"


class Effort(NamedTuple):
    """How long one case may be measured, in seconds, and how many times at most.

    `trace` is a folder for the profile of one call of each, or None.
    """

    seconds: float = 15.0
    rounds: int = 15
    trace: Path | None = None


def is_control(row: dict[str, Any]) -> bool:
    """Whether it is of the program that another row of its case is of."""
    return row["candidate"].endswith(AGAIN)


def original(name: str) -> str:
    """The candidate that a control repeats; others are their own."""
    return name.removesuffix(AGAIN)


def compile_all(
    case: Case, of: str, candidates: Iterable[str | Candidate]
) -> tuple[dict, list[dict]]:
    """`({name: program}, rows of what is missing)`; peers are given by their name."""
    programs, missing = {}, []
    for each in candidates:
        try:
            candidate = peers.make(each, case) if isinstance(each, str) else each
            programs[candidate.name] = candidate, candidate.compile(case, of)
        except Exception as error:
            # A peer may fail in any way, and is then listed as missing; ours may not.
            if not isinstance(each, str):
                raise
            row = {"case": case.name, "of": of, "candidate": each}
            reason = (str(error).splitlines() or [""])[0]
            missing.append({**row, "missing": f"{type(error).__name__}: {reason}"})
    return programs, missing


def check(case: Case, of: str, programs: dict[str, tuple[Candidate, Program]]) -> dict:
    """The deviation of each from the first; raises where one is too large."""
    deviations, common = {}, None
    for name, (candidate, program) in programs.items():
        out = program.call()
        if common is None:
            common = _common(out, of)
        got, want = program.results(out), candidate.expected(common)
        deviations[name] = deviation(name, got, want)
        if not deviations[name] <= _tolerance(case):
            raise AssertionError(
                f"{name} differs from {next(iter(programs))} by {deviations[name]:.1e} "
                f"in {case.name}, {of}."
            )
    return deviations


def _tolerance(case: Case) -> float:
    tolerance = TOLERANCES[case.x.dtype.name]
    on_cpu = jax.default_backend() == "cpu"
    return tolerance if on_cpu else max(tolerance, _MATRIX_UNITS)


def _common(out: Any, of: str) -> list:
    """The first candidate has the common layout."""
    if of == "forward":
        return [out]
    y, (of_params, of_x) = out
    return [y, of_x, of_params]


def deviation(name: str, got: list[np.ndarray], want: list[np.ndarray]) -> float:
    shapes = [[a.shape for a in arrays] for arrays in (got, want)]
    if shapes[0] != shapes[1]:
        raise AssertionError(f"{name} returns shapes {shapes[0]}, not {shapes[1]}.")
    # A gradient that is zero but for rounding (of attention's key bias) has no scale.
    least = 1e-3 * max(np.max(np.abs(b)) for b in want)
    relative = lambda a, b: np.max(np.abs(a - b)) / max(np.max(np.abs(b)), least)
    return float(max(relative(a, b) for a, b in zip(got, want)))


def take_turns(calls: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, list]:
    """Seconds of one call of each, in turn, in another order each round.

    The first is there twice, unless there is a control already.
    """
    first = next(iter(calls))
    if not any(name.endswith(AGAIN) for name in calls):
        calls = {**calls, first + AGAIN: calls[first]}
    if effort.trace is not None:
        _profile(calls, effort.trace)
    repeats = {name: _repeats(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    end = time.perf_counter() + effort.seconds
    for done in range(effort.rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            _warm_up(call)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def _profile(calls: dict[str, Callable[[], Any]], folder: Path) -> None:
    """Writes a profile of one call of each, under its name."""
    for call in calls.values():
        call()
    with jax.profiler.trace(folder):
        for name, call in calls.items():
            with jax.profiler.TraceAnnotation(name):
                call()


def _warm_up(call: Callable[[], Any]) -> None:
    """Until caches are this candidate's, and its neighbour's threads are asleep.

    OpenMP's threads spin for milliseconds after their work, on cores that the next
    candidate needs.
    """
    end = time.perf_counter() + _SHORTEST * 2
    call()
    while time.perf_counter() < end:
        call()


def _repeats(call: Callable[[], Any]) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, math.ceil(_SHORTEST / (time.perf_counter() - start)))


def summary(times: list[float], base: float) -> dict:
    """The median in seconds, and with its quartiles as a ratio to `base`."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    ratios = {"ratio": median / base, "quartiles": [low / base, high / base]}
    return {**ratios, "seconds": median}


class Prepared(NamedTuple):
    """Candidates that are compiled and agree; each may be compiled several times."""

    case: Case
    of: str
    programs: dict[str, tuple[Candidate, Program]]
    calls: dict[str, Callable[[], Any]]
    deviations: dict[str, float]
    missing: list[dict]

    def rows(self, effort: Effort) -> list[dict]:
        """A row for each candidate; ratios are to the first, which is the floor."""
        seconds: dict[str, list[float]] = {}
        for name, times in take_turns(self.calls, effort).items():
            seconds.setdefault(_without_number(name), []).extend(times)
        base = statistics.median(next(iter(seconds.values())))
        rows = [self._row(name, times, base) for name, times in seconds.items()]
        return rows + self.missing

    def _row(self, name: str, times: list[float], base: float) -> dict:
        program = self.programs[original(name)][1]
        return {
            "case": self.case.name,
            "layer": self.case.layer,
            "timesteps": self.case.timesteps,
            "of": self.of,
            "candidate": name,
            **summary(times, base),
            "compile_seconds": program.compile_seconds,
            "temporary_bytes": program.temporary_bytes,
            "deviation": self.deviations[original(name)],
        }


def prepare(
    case: Case, of: str, candidates: Iterable[str | Candidate], copies: int = 1
) -> Prepared:
    """Compiles candidates, and checks them against each other.

    With several `copies` each is compiled that many times, the control too, and their
    times are one sample: a program that is compiled again may take 1.3 times as long.
    """
    programs, missing = compile_all(case, of, candidates)
    deviations = check(case, of, programs)
    calls = {
        _numbered(0, name): program.call for name, (_, program) in programs.items()
    }
    first = next(iter(programs))
    more = [(i, name) for i in range(1, copies) for name in programs]
    if copies > 1:
        more += [(i, first + AGAIN) for i in range(copies)]
    for i, name in more:
        candidate = programs[original(name)][0]
        calls[_numbered(i, name)] = candidate.compile(case, of).call
    return Prepared(case, of, programs, calls, deviations, missing)


def _numbered(i: int, name: str) -> str:
    return f"copy {i} of {name}" if i else name


def _without_number(name: str) -> str:
    return re.sub(r"^copy \d+ of ", "", name)


def measure(
    case: Case, of: str, candidates: Iterable[str | Candidate], effort: Effort
) -> list[dict]:
    """A row for each candidate; ratios are to the first, which is the floor."""
    return prepare(case, of, candidates).rows(effort)
