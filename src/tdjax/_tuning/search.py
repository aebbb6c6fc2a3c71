"""The search: compile and check each lowering, then time those that agree.

The first candidate with `method="vmap"` that fits the memory is the reference: results
of all others are compared with its results. Programs are compiled in threads, while
others are compared; no program is timed (`rounds`) while one is compiled.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from tdjax._steps.lowering import Lowering
from tdjax._tuning.candidates import NO_TIME, TUNED, Candidate
from tdjax._tuning.clock import timed
from tdjax._tuning.deviations import Tolerances
from tdjax._tuning.processes import agreed, in_all
from tdjax._tuning.programs import Lowered, compile_lowered, lower, may_crash
from tdjax._tuning.rounds import MAY_BE_CHANCE, Contender, Race, race_seconds

# The parts of the budget that are kept for the race, at least and at most.
_FOR_RACE = 0.1, 0.5
# More threads than this only take memory: a compilation uses several itself.
_MOST_THREADS = 4
# The first runs of a program may be slow: caches are cold, and others are compiled. Up
# to three are made, until they take so many seconds in all; the least counts.
_WARM_UP, _WARM_UP_OF_DEFAULT, _WARM_RUNS = 0.25, 2 * MAY_BE_CHANCE, 3
MAY_CRASH = "may crash: XLA's CPU fusion of arrays with 7 axes"
# How many of the fastest lowerings are tried with the options of the compiler.
_WITH_COMPILER_OPTIONS = 2


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the search: seconds, bytes, and deviation from the reference."""

    budget: int | float
    memory_limit: int | None = None
    tolerance: int | float | None = None
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Seconds left of the budget."""
        return agreed(self.start + self.budget - time.perf_counter())


class _Trial(NamedTuple):
    """A candidate that is being compiled; `program()` waits for it."""

    candidate: Candidate
    run: Callable | None
    lowered: Lowered | None
    program: Callable[[], tuple[Any, float]]


@dataclasses.dataclass
class _Search:
    """The state of a search.

    `tolerances` hold the results of the reference, None before it has run. `mixing` is
    why examples may not be folded, or None, once this is known.
    """

    program_of: Callable[[Candidate], Callable]
    args: tuple
    limits: Limits
    submit: Callable[..., Callable[[], Any]]
    threads: int = 1
    least: int = 1  # Candidates that are tried however short the time is.
    tolerances: Tolerances | None = None
    contenders: list[Contender] = dataclasses.field(default_factory=list)
    mixing: list[str | None] = dataclasses.field(default_factory=list)
    tried: list[Candidate] = dataclasses.field(default_factory=list)


def measure_all(
    candidates: list[Candidate],
    program_of: Callable[[Candidate], Callable],
    args: tuple,
    limits: Limits,
    report: Callable[[Candidate], None],
    interrupted: threading.Event,
    compiler_options: Sequence[Mapping[str, Any]] = (),
    least: int = 1,
) -> bool:
    """Measures in place, and returns whether the search is finished.

    `program_of(candidate)` is the function to compile. `interrupted` is set at Ctrl-C.
    The fastest lowerings are tried with each of `compiler_options` too, and then are
    added to `candidates`. The first `least` are tried however short the time is.
    """
    is_decided, race = False, None
    with _compiler_threads() as (submit, threads):
        search = _Search(program_of, args, limits, submit, threads, least)
        try:
            _try_all(candidates, search, report)
            if compiler_options and search.contenders:
                more = _with_compiler_options(search.contenders, compiler_options)
                candidates += more
                _try_all(more, search, report)
            search.tolerances = None  # Frees the results.
            if not search.contenders:
                return not any(candidate.is_left for candidate in candidates)
            race = _race(search)
            is_decided = race.run()
        except KeyboardInterrupt:
            # What is known is returned, if anything is.
            if not search.contenders or jax.process_count() > 1:
                raise
            interrupted.set()
            race = race or _race(search)
    race.summarise()
    return is_decided and not any(candidate.is_left for candidate in candidates)


def _race(search: _Search) -> Race:
    """A race that takes about as long as what came before."""
    so_far = search.limits.budget - search.limits.left()
    return Race(search.contenders, search.args, search.limits.left, so_far)


@contextlib.contextmanager
def _compiler_threads() -> Iterator[tuple[Callable, int]]:
    """`(submit, threads)`: `submit(fun, *args)` returns a function that waits."""
    # Several processes must compile in the same order.
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    if jax.process_count() > 1 or threads == 1:
        yield lambda fun, *args: lambda: fun(*args), 1
        return
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        yield lambda fun, *args: pool.submit(fun, *args).result, threads
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _try_all(candidates: list[Candidate], search: _Search, report) -> None:
    """Compiles the candidates, several at once, and checks one after the other."""
    waiting, started = collections.deque(candidates), collections.deque[_Trial]()
    while waiting or started:
        while waiting and len(started) < search.threads:
            candidate = waiting.popleft()
            is_due = len(search.tried) + len(started) < search.least
            if is_due or _expected(candidate, search) < _left_for_trials(search):
                started.append(_start(candidate, search))
            else:
                candidate.verdict = NO_TIME
                report(candidate)
        if not started:
            continue
        trial = started.popleft()
        others = [*(t.candidate for t in started), *waiting]
        if search.tolerances or _may_be_reference(trial.candidate):
            _finish(trial, search)
            search.tried.append(trial.candidate)
        elif any(map(_may_be_reference, others)):
            started.append(trial)
            if waiting and not any(_may_be_reference(t.candidate) for t in started):
                started.append(_start(_next_reference(waiting), search))
            continue
        else:
            trial.candidate.verdict = "no reference can be run"
        report(trial.candidate)


def _left_for_trials(search: _Search) -> float:
    """Seconds until the contenders so far must be timed in turn."""
    least, most = (part * search.limits.budget for part in _FOR_RACE)
    kept = min(max(race_seconds(search.contenders), least), most)
    return search.limits.left() - kept


def agree(
    reference: Lowering,
    best: Candidate,
    program_of: Callable[[Candidate], Callable],
    args: tuple,
    limits: Limits,
) -> bool:
    """Whether a candidate, one from a cache, gives the numbers of the reference."""
    lowering, options = best.lowering, best.compiler_options
    if lowering == reference and not options:
        return True
    at_once = lambda fun, *args: lambda: fun(*args)
    search = _Search(program_of, args, limits, at_once)
    pair = Candidate(reference), Candidate(lowering, compiler_options=options)
    for candidate in pair:
        _finish(_start(candidate, search), search)
    return all(candidate.measured for candidate in pair)


def _may_be_reference(candidate: Candidate) -> bool:
    is_plain = candidate.lowering.method == "vmap" or candidate.lowering == TUNED
    return is_plain and not candidate.compiler_options


def _next_reference(waiting: collections.deque[Candidate]) -> Candidate:
    candidate = next(filter(_may_be_reference, waiting))
    waiting.remove(candidate)
    return candidate


def find_reference(candidates: Iterable[Candidate]) -> Candidate | None:
    """With which the others of a search were compared: the first that ran."""
    ran = [c for c in candidates if c.verdict in ("measured", "behind")]
    return next(filter(_may_be_reference, ran), None)


def _with_compiler_options(
    contenders: list[Contender], compiler_options: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    """The fastest lowerings so far, and the default, with options of the compiler."""
    fastest = sorted(contenders, key=lambda c: c.alone)[:_WITH_COMPILER_OPTIONS]
    chosen = [c for c in contenders if c in fastest or c.candidate.is_default]
    return [
        Candidate(c.candidate.lowering, c.candidate.blocks, dict(options))
        for options in compiler_options
        for c in chosen
    ]


def _expected(candidate: Candidate, search: _Search) -> float:
    """Seconds that compilation and two runs may take, judged by the others."""
    known = [c.compile_seconds for c in search.tried if c.compile_seconds is not None]
    fastest = min(known, default=0.0)
    blocks = candidate.blocks if candidate.lowering.unroll is True else 1
    # Code that is repeated compiles faster than the first of its kind.
    seconds = fastest * (1.2 + blocks / 8)
    best = min((c.alone for c in search.contenders), default=math.inf)
    return seconds + (2 * best if best < math.inf else 0.0)


def _start(candidate: Candidate, search: _Search) -> _Trial:
    """Traces a candidate here, since the contexts of JAX are those of a thread."""
    run, lowered = None, None
    try:
        run = search.program_of(candidate)  # A module may refuse its options.
        lowered = lower(candidate, run, search.args, search.mixing)
        program = search.submit(compile_lowered, lowered, candidate.compiler_options)
    except Exception as error:
        program = _raising(error)
    return _Trial(candidate, run, lowered, program)


def _raising(error: Exception) -> Callable:
    def program():
        raise error

    return program


def _finish(trial: _Trial, search: _Search) -> None:
    """Checks a candidate's memory and numbers, and notes the verdict."""
    candidate = trial.candidate
    compiled = _attempt(trial.program, candidate, search)
    if compiled is None or trial.lowered is None or trial.run is None:
        return
    program, seconds = compiled
    candidate.compile_seconds = agreed(seconds)
    if not in_all(not may_crash(program)):
        candidate.verdict = MAY_CRASH
        return
    used = candidate.temporary_bytes = temporary_bytes(program)
    limit = search.limits.memory_limit
    if not in_all(used is None or limit is None or used <= limit):
        candidate.verdict = "over the memory limit"
        return
    ran = _attempt(lambda: timed(program, search.args), candidate, search)
    if ran is None:
        return
    seconds, results = ran
    if search.tolerances is None:
        given = search.limits.tolerance
        search.tolerances = Tolerances(results, trial.run, search.args, given)
    verdict = _compare(candidate, results, search.tolerances)
    if verdict == "measured" and trial.lowered.reason:
        reason = trial.lowered.reason
        verdict = f"may depend on the rest of the batch: {reason}"
    candidate.verdict = verdict
    if candidate.measured:
        runs = [agreed(seconds)]
        # All ratios are to the default's time, so chance must not decide it.
        enough = _WARM_UP_OF_DEFAULT if candidate.is_default else _WARM_UP
        del ran, results  # Memory for the next.
        while len(runs) < _WARM_RUNS and sum(runs) < enough:
            again = _attempt(lambda: timed(program, search.args)[0], candidate, search)
            if again is None:
                return
            runs.append(agreed(again))
        search.contenders.append(Contender(candidate, program, min(runs)))


def temporary_bytes(program: Any) -> int | None:
    """The memory of a program, if XLA knows it."""
    memory = program.memory_analysis()
    return None if memory is None else int(memory.temp_size_in_bytes)


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
    if search.tolerances is None and not in_all(is_for_memory):
        raise failure or RuntimeError("The reference failed in another process.")
    line = (str(failure).splitlines() or [""])[0]
    of_this = f"{type(failure).__name__}: {line}" if failure else "in another process"
    candidate.verdict = f"failed: {of_this}"
    return None


def _compare(candidate: Candidate, results, tolerances: Tolerances) -> str:
    """Notes how far off the results are, and returns a verdict."""
    if not tolerances.has_shapes_of(results):
        return "other shapes than the reference"
    candidate.deviation, agrees = tolerances.agrees(results)
    return "measured" if in_all(agrees) else "other numbers than the reference"
