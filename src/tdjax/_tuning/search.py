"""The order of the search: try each lowering once, then time the good ones in turn."""

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from tdjax._tuning.candidates import (
    Candidate,
    compile_candidate,
    default_tolerance,
    deviations,
    is_float,
    timed,
    widen,
)

# A candidate this many times behind the best is not measured again: at first, and
# once there are enough measurements to tell.
_FAR_BEHIND = 1.5
_BEHIND = 1.15
# Of candidates this close to the fastest, the one with the least memory is taken.
_AS_GOOD = 1.02
_MOST_ROUNDS = 13
_SHORTEST_MEASUREMENT = 5e-3  # seconds
# What part of the time left a run may take to be made twice before the turns.
_SHORT_RUN = 0.03
# What part of the budget may be spent before the candidates are timed in turn.
_FOR_TRIALS = 0.8


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the search may use: seconds, bytes, and deviation from the reference."""

    budget: int | float
    memory_limit: int | None = None
    tolerance: int | float | None = None
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def left(self, part: float = 1.0) -> float:
        """Seconds left of a part of the budget."""
        return self.start + part * self.budget - time.perf_counter()


@dataclasses.dataclass
class _Search:
    """What is known so far: the results of the reference, and how near is near."""

    program_of: Callable[[dict], Callable]
    args: tuple
    limits: Limits
    want: Any = None
    allowed: list[float] = dataclasses.field(default_factory=list)
    running: list[tuple[Candidate, Any, list[float]]] = dataclasses.field(
        default_factory=list
    )

    def best_seconds(self) -> float:
        return min((min(times) for _, _, times in self.running), default=math.inf)


def measure_all(
    candidates: Iterable[Candidate],
    program_of: Callable[[dict], Callable],
    args: tuple,
    limits: Limits,
    report: Callable[[Candidate], None],
) -> None:
    """Measures in place; `program_of(options)` is the function to compile.

    The first candidate with `method="vmap"` that fits the memory is the reference.
    """
    search = _Search(program_of, args, limits)
    waiting = collections.deque(candidates)
    compiled: list[Candidate] = []
    while waiting:
        candidate = waiting.popleft()
        can_compare = search.want is not None or candidate.options["method"] == "vmap"
        if not can_compare and any(c.options["method"] == "vmap" for c in waiting):
            waiting.append(candidate)
            continue
        if not can_compare:
            candidate.verdict = "no reference fits the memory limit"
        elif compiled and _expected(candidate, compiled, search) > limits.left(
            _FOR_TRIALS
        ):
            candidate.verdict = "no time left"
        else:
            _try(candidate, search)
            compiled.append(candidate)
        report(candidate)
    search.want = None
    _take_turns(search)


def choose(candidates: Iterable[Candidate]) -> Candidate:
    """The fastest; of those as good as it, the one with the least memory."""
    measured = [each for each in candidates if each.measured]
    seconds = lambda each: each.run_seconds or 0.0
    fastest = min(map(seconds, measured))
    good = [each for each in measured if seconds(each) <= _AS_GOOD * fastest]
    return min(good, key=lambda each: each.temporary_bytes or 0)


def _expected(candidate: Candidate, compiled: list[Candidate], search) -> float:
    """Seconds of compilation and of two runs, from those of the others."""
    fastest = min(each.compile_seconds or 0.0 for each in compiled)
    blocks = candidate.blocks if candidate.options["unroll"] is True else 1
    # Code that is repeated compiles faster than the first of its kind.
    seconds = fastest * (1.2 + blocks / 8)
    best = search.best_seconds()
    return seconds + (2 * best if best < math.inf else 0.0)


def _try(candidate: Candidate, search: _Search) -> None:
    """Compiles, checks and times one candidate; notes a verdict."""
    try:
        run = search.program_of(candidate.options)
        program = compile_candidate(candidate, run, search.args)
        if _over(candidate.temporary_bytes, search.limits.memory_limit):
            candidate.verdict = "over the memory limit"
            return
        seconds, y = timed(program, search.args)
    except Exception as error:
        # Whatever XLA or fun raises for one lowering, others may still do.
        if search.want is None and not _is_exhausted(error):
            raise
        candidate.verdict = f"failed: {type(error).__name__}: {_first_line(error)}"
        return
    if search.want is None:
        search.want, search.allowed = y, _allowed(y, run, search)
    _compare(candidate, y, search)
    del y
    if candidate.verdict == "measured":
        _time_once_more(candidate, program, seconds, search)


def _over(used: int | None, limit: int | None) -> bool:
    return used is not None and limit is not None and used > limit


def _is_exhausted(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _compare(candidate: Candidate, y, search: _Search) -> None:
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    if shapes(y) != shapes(search.want):
        candidate.verdict = "other shapes than the reference"
        return
    found = [float(each) for each in jax.tree.leaves(deviations(y, search.want))]
    candidate.deviation = max(found, default=0.0)
    agrees = all(each <= limit for each, limit in zip(found, search.allowed))
    candidate.verdict = "measured" if agrees else "other numbers than the reference"


def _allowed(y, run: Callable, search: _Search) -> list[float]:
    """The deviation to allow, for each result of the reference `y`."""
    if search.limits.tolerance is not None:
        return [search.limits.tolerance] * len(jax.tree.leaves(y))
    by_dtype = default_tolerance(y)
    if not any(x.dtype.itemsize == 2 for x in jax.tree.leaves(y) if is_float(x)):
        return by_dtype
    try:
        exact = jax.jit(run)(*widen(search.args))
        own = [float(each) for each in jax.tree.leaves(deviations(y, exact))]
    except Exception:
        return by_dtype  # fun takes no other dtype
    # A sum in half precision may be off by more than that. Two programs that are each
    # as far from the truth as the reference is differ by twice as much at most.
    return [max(limit, 2 * error) for limit, error in zip(by_dtype, own)]


def _time_once_more(candidate, program, first: float, search: _Search) -> None:
    """The first run was a warm-up; a long one matters less, and costs more."""
    seconds = first
    if first < _SHORT_RUN * search.limits.left():
        # The least of a few: one alone may have been disturbed.
        few = 3 if first < 0.1 * _SHORT_RUN * search.limits.left() else 1
        calls = _calls(first)
        seconds = min(timed(program, search.args, calls)[0] for _ in range(few))
    candidate.run_seconds = seconds
    if seconds > 2 * _FAR_BEHIND * search.best_seconds():
        candidate.verdict = "behind"
        return
    search.running.append((candidate, program, [seconds]))


def _calls(seconds: float) -> int:
    return max(1, math.ceil(_SHORTEST_MEASUREMENT / max(seconds, 1e-6)))


def _take_turns(search: _Search) -> None:
    for done in range(_MOST_ROUNDS if search.running else 0):
        if done >= 2:
            _drop_the_slow(search, _FAR_BEHIND if done < 5 else _BEHIND)
        left = search.limits.left()
        calls = [_calls(min(times)) for _, _, times in search.running]
        if sum(n * min(t) for n, (_, _, t) in zip(calls, search.running)) > left:
            break
        for n, (_, program, times) in zip(calls, search.running):
            times.append(timed(program, search.args, n)[0])
    for candidate, _, times in search.running:
        _summarise(candidate, times)


def _drop_the_slow(search: _Search, times_behind: float) -> None:
    typical = lambda times: statistics.median(times[1:])
    limit = times_behind * min(typical(times) for _, _, times in search.running)
    for candidate, _, times in search.running:
        if typical(times) > limit:
            _summarise(candidate, times)
            candidate.verdict = "behind"
    search.running = [each for each in search.running if each[0].measured]


def _summarise(candidate: Candidate, times: list[float]) -> None:
    # The first was not taken in turn with the others.
    times = times[1:] or times
    candidate.run_seconds = statistics.median(times)
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        candidate.spread = (low, high)
