"""The search: try each lowering once, then time the good ones in turn.

The first candidate with `method="vmap"` that fits the memory is the reference: results
of all others are compared with its results. What is far behind is dropped early.
"""

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from tdjax._steps.lowering import Lowering
from tdjax._tuning.candidates import (
    Candidate,
    compile_candidate,
    default_tolerance,
    deviations,
    is_float,
    timed,
    widen,
)
from tdjax._tuning.processes import agreed, in_all

# A candidate that is this many times slower than the best is dropped: in the first
# rounds, and once there are enough measurements to tell.
_FAR_BEHIND = 1.5
_BEHIND = 1.15
# Of candidates this close to the fastest, the one with the least memory is taken.
_AS_GOOD = 1.02
_MOST_ROUNDS = 13
_SHORTEST_MEASUREMENT = 5e-3  # seconds
# A run that takes less than this part of the time left is repeated before the rounds.
_SHORT_RUN = 0.03
# The part of the budget that may be spent before the candidates are timed in turn.
_FOR_TRIALS = 0.8


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the search: seconds, bytes, and deviation from the reference."""

    budget: int | float
    memory_limit: int | None = None
    tolerance: int | float | None = None
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def left(self, part: float = 1.0) -> float:
        """Seconds left of a part of the budget."""
        return agreed(self.start + part * self.budget - time.perf_counter())


class _Contender(NamedTuple):
    """A candidate that is still in the race: its program, and the times of its runs."""

    candidate: Candidate
    program: Any
    seconds: list[float]


@dataclasses.dataclass
class _Search:
    """The state of a search.

    `reference` are the results of the reference, None before it has run; `tolerances`
    are the deviations allowed in each of them. `mixing` is why examples may not be
    folded, or None, once this is known.
    """

    program_of: Callable[[Lowering], Callable]
    args: tuple
    limits: Limits
    reference: Any = None
    tolerances: list[float] = dataclasses.field(default_factory=list)
    contenders: list[_Contender] = dataclasses.field(default_factory=list)
    mixing: list[str | None] = dataclasses.field(default_factory=list)

    def best_seconds(self) -> float:
        return min((min(c.seconds) for c in self.contenders), default=math.inf)


def measure_all(
    candidates: Iterable[Candidate],
    program_of: Callable[[Lowering], Callable],
    args: tuple,
    limits: Limits,
    report: Callable[[Candidate], None],
) -> None:
    """Measures in place; `program_of(lowering)` is the function to compile."""
    search = _Search(program_of, args, limits)
    waiting = collections.deque(candidates)
    tried: list[Candidate] = []
    while waiting:
        candidate = waiting.popleft()
        can_compare = search.reference is not None or _may_be_reference(candidate)
        if not can_compare and any(map(_may_be_reference, waiting)):
            waiting.append(candidate)
            continue
        if not can_compare:
            candidate.verdict = "no reference fits the memory limit"
        elif tried and _expected(candidate, tried, search) > limits.left(_FOR_TRIALS):
            candidate.verdict = "no time left"
        else:
            _try(candidate, search)
            tried.append(candidate)
        report(candidate)
    search.reference = None
    _take_turns(search)


def agree(
    reference: Lowering,
    lowering: Lowering,
    program_of: Callable[[Lowering], Callable],
    args: tuple,
    limits: Limits,
) -> bool:
    """Whether a lowering, one from a cache, gives the numbers of the reference."""
    if lowering == reference:
        return True
    search = _Search(program_of, args, limits)
    pair = Candidate(reference), Candidate(lowering)
    for candidate in pair:
        _try(candidate, search, times_again=False)
    return all(candidate.measured for candidate in pair)


def _may_be_reference(candidate: Candidate) -> bool:
    return candidate.lowering.method == "vmap"


def find_reference(candidates: Iterable[Candidate]) -> Candidate | None:
    """With which the others of a search were compared: the first that ran."""
    ran = [c for c in candidates if c.verdict in ("measured", "behind")]
    return next(filter(_may_be_reference, ran), None)


def choose(candidates: Iterable[Candidate]) -> Candidate:
    """The fastest; of those that are as good, the one with the least memory."""
    measured = [candidate for candidate in candidates if candidate.measured]
    seconds = lambda candidate: candidate.run_seconds or 0.0
    fastest = min(map(seconds, measured))
    good = [c for c in measured if seconds(c) <= _AS_GOOD * fastest]
    return min(good, key=lambda candidate: candidate.temporary_bytes or 0)


def _expected(candidate: Candidate, tried: list[Candidate], search: _Search) -> float:
    """Seconds that compilation and two runs may take, judged by the others."""
    known = [c.compile_seconds for c in tried if c.compile_seconds is not None]
    fastest = min(known, default=0.0)
    blocks = candidate.blocks if candidate.lowering.unroll is True else 1
    # Code that is repeated compiles faster than the first of its kind.
    seconds = fastest * (1.2 + blocks / 8)
    best = search.best_seconds()
    return seconds + (2 * best if best < math.inf else 0.0)


def _try(candidate: Candidate, search: _Search, times_again: bool = True) -> None:
    """Compiles, checks and times one candidate, and notes the verdict."""
    run = search.program_of(candidate.lowering)
    compile_it = lambda: compile_candidate(candidate, run, search.args, search.mixing)
    compiled = _attempt(compile_it, candidate, search)
    if compiled is None:
        candidate.compile_seconds = None
        return
    program, reason = compiled
    candidate.compile_seconds = agreed(candidate.compile_seconds or 0.0)
    used, limit = candidate.temporary_bytes, search.limits.memory_limit
    if not in_all(used is None or limit is None or used <= limit):
        candidate.verdict = "over the memory limit"
        return
    ran = _attempt(lambda: timed(program, search.args), candidate, search)
    if ran is None:
        return
    seconds, results = ran
    if search.reference is None:
        search.reference = results
        search.tolerances = _tolerances(results, run, search)
    _compare(candidate, results, search)
    del results
    if candidate.measured and reason:
        candidate.verdict = f"may depend on the rest of the batch: {reason}"
    if candidate.measured and times_again:
        _time_once_more(candidate, program, seconds, search)


def _attempt(action: Callable, candidate: Candidate, search: _Search) -> Any:
    """What it returns; None, and the verdict is set, if it fails in any process."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        # XLA and fun may raise anything for one lowering; others may still work.
        failure = error
    if in_all(failure is None):
        return result
    is_for_memory = failure is None or "RESOURCE_EXHAUSTED" in str(failure)
    if search.reference is None and not in_all(is_for_memory):
        raise failure or RuntimeError("The reference failed in another process.")
    line = (str(failure).splitlines() or [""])[0]
    of_this = f"{type(failure).__name__}: {line}" if failure else "in another process"
    candidate.verdict = f"failed: {of_this}"
    return None


def _compare(candidate: Candidate, results, search: _Search) -> None:
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    if shapes(results) != shapes(search.reference):
        candidate.verdict = "other shapes than the reference"
        return
    errors = _errors(results, search.reference)
    candidate.deviation = max(errors, default=0.0)
    pairs = zip(errors, search.tolerances)
    agrees = in_all(all(error <= limit for error, limit in pairs))
    candidate.verdict = "measured" if agrees else "other numbers than the reference"


def _errors(results, reference) -> list[float]:
    return [float(x) for x in jax.tree.leaves(deviations(results, reference))]


def _tolerances(reference, run: Callable, search: _Search) -> list[float]:
    """The deviation to allow in each result of the reference."""
    if search.limits.tolerance is not None:
        return [search.limits.tolerance] * len(jax.tree.leaves(reference))
    by_dtype = [default_tolerance(x.dtype) for x in jax.tree.leaves(reference)]
    floats = [x for x in jax.tree.leaves(reference) if is_float(x)]
    if not any(x.dtype.itemsize == 2 for x in floats):
        return by_dtype
    try:
        errors = _errors(reference, jax.jit(run)(*widen(search.args)))
    except Exception:
        return by_dtype  # fun takes no other dtype
    # A sum in half precision may be further off than `by_dtype`. Two programs that are
    # each as far from the truth as the reference differ by twice as much at most.
    return [max(limit, 2 * error) for limit, error in zip(by_dtype, errors)]


def _time_once_more(candidate, program, first: float, search: _Search) -> None:
    """Repeats a short run, in which the warm-up matters most."""
    seconds = first = agreed(first)
    if first < _SHORT_RUN * search.limits.left():
        # The least of three: a single run may have been disturbed.
        repeats = 3 if first < 0.1 * _SHORT_RUN * search.limits.left() else 1
        calls = _calls(first)
        seconds = min(_time(program, search.args, calls) for _ in range(repeats))
    candidate.run_seconds = seconds
    if seconds > 2 * _FAR_BEHIND * search.best_seconds():
        candidate.verdict = "behind"
        return
    search.contenders.append(_Contender(candidate, program, [seconds]))


def _time(program, args, calls: int) -> float:
    """Seconds per call, as process 0 measures them."""
    return agreed(timed(program, args, calls)[0])


def _calls(seconds: float) -> int:
    """How many calls make a measurement that is long enough."""
    return max(1, math.ceil(_SHORTEST_MEASUREMENT / max(seconds, 1e-6)))


def _take_turns(search: _Search) -> None:
    """Times the contenders in rounds, one measurement of each per round."""
    for done in range(_MOST_ROUNDS if search.contenders else 0):
        if done >= 2:
            _drop_the_slow(search, _FAR_BEHIND if done < 5 else _BEHIND)
        calls = [_calls(min(c.seconds)) for c in search.contenders]
        round_seconds = [n * min(c.seconds) for n, c in zip(calls, search.contenders)]
        if sum(round_seconds) > search.limits.left():
            break
        for n, contender in zip(calls, search.contenders):
            contender.seconds.append(_time(contender.program, search.args, n))
    for contender in search.contenders:
        _summarise(contender)


def _drop_the_slow(search: _Search, times_slower: float) -> None:
    typical = lambda contender: statistics.median(contender.seconds[1:])
    limit = times_slower * min(map(typical, search.contenders))
    for contender in search.contenders:
        if typical(contender) > limit:
            _summarise(contender)
            contender.candidate.verdict = "behind"
    search.contenders = [c for c in search.contenders if c.candidate.measured]


def _summarise(contender: _Contender) -> None:
    # The first measurement was not taken in turn with the others.
    seconds = contender.seconds[1:] or contender.seconds
    contender.candidate.run_seconds = statistics.median(seconds)
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        contender.candidate.spread = (low, high)
