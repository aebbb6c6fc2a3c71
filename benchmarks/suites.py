"""The suites: each lists its tasks, and a task measures one case."""

import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import (
    cases,
    dispatch,
    keras_models,
    keras_runs,
    kernels,
    mesh,
    ours,
    peers,
    ragged,
    vocabularies,
    whole_models,
)
from benchmarks.candidate import Candidate
from benchmarks.measure import Effort, is_control, measure, prepare, summary, take_turns
from benchmarks.targets import ALONE, BUSY

Row = dict[str, Any]
BOTH = ("forward", "gradient")
# Candidates of the tuner that take longer than this, beside the default, are not timed
# again. Of the others, the fastest few are compiled three times and timed again: a few
# rounds of one program are not enough: calls are disturbed and compilations differ.
_NEAR, _FINALISTS, _COPIES = 1.25, 5, 3
_MORE_ROUNDS = Effort(30.0, 10)


class Task(NamedTuple):
    """Something to measure, under a name that no other task of the suite has."""

    case: str
    of: str
    run: Callable[[], list[Row]]


class Settings(NamedTuple):
    """Small shapes and few rounds (`quick`), or not; a folder for profiles."""

    quick: bool = False
    trace: Path | None = None

    @property
    def effort(self) -> Effort:
        few, many = Effort(0.2, 2, self.trace), Effort(6.0, 15, self.trace)
        return few if self.quick else many

    def budget(self, layer: str) -> float:
        """Seconds for the tuner: what compiles and runs longer gets more."""
        if self.quick:
            return 0.3
        return {"Dense": 4.0, "conv net": 60.0}.get(layer, 12.0)


def _tasks(
    listing: list, run: Callable, settings: Settings, what: tuple[str, ...] = BOTH
) -> Iterator[Task]:
    """`run(case, of, settings)` for every case, and each of `what`."""
    for case in listing:
        for of in what:
            yield Task(case.name, of, functools.partial(run, case, of, settings))


def dense(settings: Settings) -> Iterator[Task]:
    """Dense over a grid of shapes and dtypes, against all peers and the roofline."""
    return _tasks(cases.dense_grid(settings.quick), _dense_rows, settings)


def blocks(settings: Settings) -> Iterator[Task]:
    """MLP, LayerNorm block, attention inside each step, GRU with a head."""
    return _tasks(cases.blocks(settings.quick), _beside_peers, settings)


def video(settings: Settings) -> Iterator[Task]:
    """A conv net over the frames of a video."""
    return _tasks(cases.videos(settings.quick), _beside_peers, settings)


def _beside_peers(case, of: str, settings: Settings) -> list[Row]:
    tuned = ours.tune(case, of, settings.budget(case.layer))
    pick = ours.transform(case, "time_distributed, tuned", **tuned.options)
    floor, *others = peers.NAMES
    # It takes a minute to import and compile anything.
    skip = ("torch_compiled",) if settings.quick else ()
    others = [name for name in others if name not in skip]
    candidates = [floor, pick, *ours.fixed(case), *others]
    rows = measure(case, of, candidates, settings.effort)
    return [{**row, "options": tuned.options} for row in rows]


def _dense_rows(case, of: str, settings: Settings) -> list[Row]:
    flops, moved = cases.dense_floor_work(case, of)
    work = {"flops": flops, "bytes": moved, "dtype": case.x.dtype.name}
    return [{**row, **work} for row in _beside_peers(case, of, settings)]


def compilation(settings: Settings) -> Iterator[Task]:
    """Time to trace and compile Dense against the number of steps."""
    times = (16, 64) if settings.quick else (16, 64, 256, 1024, 4096)
    listing = [cases.make_case("Dense", (4, timesteps, 32)) for timesteps in times]
    return _tasks(listing, _compile_rows, settings)


def _compile_rows(case, of: str, settings: Settings) -> list[Row]:
    blocks = case.timesteps // 8
    candidates: list[Candidate] = [
        ours.transform(case, "vmap"),
        ours.transform(case, "fold", method="fold"),
        ours.transform(case, "loop over 8 blocks", chunk_size=blocks),
        peers.make("raw", case),
    ]
    missing = []
    # It unrolls: 1024 steps take it a minute, and the gradient many.
    most = 16 if settings.quick else {"forward": 1024, "gradient": 256}[of]
    try:
        candidates.append(peers.keras_module().candidate(case, most))
    except (ImportError, NotImplementedError) as error:
        missing.append(_missing(case, of, "Keras TimeDistributed", error))
    seconds = _compile_seconds(case, of, candidates)
    row = {"case": case.name, "timesteps": case.timesteps, "of": of}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return [
        *({**row, "candidate": n, "compile_seconds": s} for n, s in medians.items()),
        *missing,
    ]


def _compile_seconds(case, of: str, candidates: list[Candidate]) -> dict[str, list]:
    seconds: dict[str, list] = {each.name: [] for each in candidates}
    for attempt in range(5):
        for each in candidates:
            slow = attempt and seconds[each.name][0] > 2
            if not slow:
                jax.clear_caches()
                seconds[each.name].append(each.compile(case, of).compile_seconds)
    return seconds


def memory(settings: Settings) -> Iterator[Task]:
    """The conv net's gradient: time and memory against chunk size."""
    for case in cases.videos(settings.quick):
        run = functools.partial(_memory_rows, case, settings)
        yield Task(case.name, "gradient", run)


def _memory_rows(case, settings: Settings) -> list[Row]:
    sizes = [2**n for n in range(int(math.log2(case.timesteps)))]
    candidates = [ours.transform(case, "vmap, all steps at once")]
    for size in reversed(sizes):
        for remat in (False, True):
            name = f"chunk_size={size}, remat={remat}"
            options = {"chunk_size": size, "remat": remat}
            candidates.append(ours.transform(case, name, **options))
    kept = math.prod(case.cotangent.shape) * case.cotangent.dtype.itemsize * 3
    rows = measure(case, "gradient", candidates, settings.effort)
    return [{**row, "activation_bytes": kept} for row in rows]


def tuner(settings: Settings) -> Iterator[Task]:
    """The tuner's pick beside every fixed choice, timed again, and its own time."""
    some, dense = cases.blocks(settings.quick), cases.dense_grid(settings.quick)
    listing = [*some, *cases.videos(settings.quick), dense[0], dense[-1]]
    return _tasks(some[:1] if settings.quick else listing, _tuner_rows, settings)


def _tuner_rows(case, of: str, settings: Settings) -> list[Row]:
    budget = 0.5 if settings.quick else max(40.0, settings.budget(case.layer))
    default, spent, picks, tried = "", {}, {}, {}
    for search in (*ALONE, *BUSY):
        with busy_processes(2 if search in BUSY else 0):
            start = time.perf_counter()
            tuning = ours.tune(case, of, budget)
            spent[search] = time.perf_counter() - start
        picks[search] = str(tuning.best)
        default = str(tuning.candidates[0])
        worth = [c for c in tuning.candidates if c.is_default or _is_near(c)]
        tried |= {str(c): c.options for c in worth if c.run_seconds}
    candidates = [ours.transform(case, name, **tried[name]) for name in tried]
    # The default is what others are measured by.
    candidates.sort(key=lambda each: each.name != default)
    rows = measure(case, of, candidates, settings.effort)
    if settings.quick:
        rows = _chosen(rows, picks, (*ALONE, *BUSY))
    else:
        rows = _finals(case, of, candidates, rows, picks)
    used = {"budget": budget, "spent": spent}
    return [{**row, **used} for row in rows]


def _finals(
    case, of: str, candidates: list[Candidate], rows: list[Row], picks: dict[str, str]
) -> list[Row]:
    """More rounds of the default, the picks, and what may be the fastest.

    They are timed twice: alone, and beside what the last search was beside. Ratios of
    the rounds before can't be compared with theirs: `behind` is the time beside the
    fastest of those rounds.
    """
    rows = [row for row in rows if not is_control(row)]
    by_ratio = sorted(rows, key=lambda row: row["ratio"])
    names = {*picks.values(), *(row["candidate"] for row in by_ratio[:_FINALISTS])}
    default, *others = candidates
    finalists = [default, *(each for each in others if each.name in names)]
    programs = prepare(case, of, finalists, _COPIES)
    finals = _chosen(programs.rows(_MORE_ROUNDS), picks, ALONE)
    with busy_processes(2):
        beside = _chosen(programs.rows(_MORE_ROUNDS), picks, BUSY)
    beside = [{**row, "of": f"{of}, {BUSY[0]}"} for row in beside]
    measured = {row["candidate"] for row in finals}
    fastest = by_ratio[0]["ratio"]
    rest = [row for row in rows if row["candidate"] not in measured]
    rest = [{**row, "chosen": [], "behind": row["ratio"] / fastest} for row in rest]
    return [*finals, *rest, *beside]


def _is_near(candidate) -> bool:
    """Whether it may be the fastest: what is dropped early was timed once or more."""
    return candidate.measured or (candidate.ratio or math.inf) < _NEAR


def _chosen(
    rows: list[Row], picks: dict[str, str], searches: tuple[str, ...]
) -> list[Row]:
    """The rows, each with those of the searches that chose it."""
    of = lambda row: [each for each in searches if picks[each] == row["candidate"]]
    return [{**row, "chosen": of(row)} for row in rows]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other processes that use a core each."""
    # They end with this one, however it ends.
    text = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    others = [subprocess.Popen([sys.executable, "-c", text]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def models(settings: Settings) -> Iterator[Task]:
    """Whole models, tuned and not."""
    budget = 1.0 if settings.quick else 120.0
    run = lambda case, of, settings: whole_models.rows(
        case, of, settings.effort, budget
    )
    listing, of = whole_models.cases(settings.quick), whole_models.OF
    return _tasks(listing, run, settings, of[:1] if settings.quick else of)


def packing(settings: Settings) -> Iterator[Task]:
    """Ragged batches: only the valid steps computed, beside all of them."""
    run = lambda case, of, settings: ragged.rows(case, of, settings.effort)
    return _tasks(ragged.cases(settings.quick), run, settings)


def loss(settings: Settings) -> Iterator[Task]:
    """The fused softmax head and loss, beside its peers and its floor."""
    run = lambda case, of, settings: vocabularies.rows(case, of, settings.effort)
    listing, more = vocabularies.cases, vocabularies.more_cases
    yield from _tasks(listing(settings.quick), run, settings, vocabularies.LOSS)
    of = vocabularies.PACKED, vocabularies.LOG_PROBS
    yield from _tasks(more(settings.quick), run, settings, of)


def on_mesh(settings: Settings) -> Iterator[Task]:
    """What each device computes, holds and sends, on 1 to 8 devices."""
    run = lambda case, of, settings: mesh.rows(case, of, settings.quick)
    return _tasks(mesh.cases(settings.quick), run, settings)


def keras(settings: Settings) -> Iterator[Task]:
    """Whole Keras models, with Keras' layer, the drop-in, and as Flax modules."""
    run = lambda case, of, settings: keras_runs.rows(case, of, settings.effort)
    return _tasks(keras_models.cases(settings.quick), run, settings, keras_runs.OF)


def operations(settings: Settings) -> Iterator[Task]:
    """Single products and convolutions, by XLA and by PyTorch: beyond any lowering."""
    for name, calls in kernels.calls(settings.quick).items():
        run = functools.partial(_call_rows, name, "one operation", calls, settings)
        yield Task(name, "one operation", run)


def overhead(settings: Settings) -> Iterator[Task]:
    """One call of NNX modules from Python; and tracing, with a table and without."""
    name, calls = "one call of an NNX Dense", dispatch.calls()
    run = functools.partial(_call_rows, name, "forward", calls, settings)
    yield Task(name, "forward", run)
    name, calls = f"{dispatch.LAYERS} layers in Linen", dispatch.traces()
    run = functools.partial(_call_rows, name, "tracing", calls, settings)
    more = {"layers": dispatch.LAYERS}
    yield Task(name, "tracing", lambda: [{**row, **more} for row in run()])


def _call_rows(case: str, of: str, calls: dict, settings: Settings) -> list[Row]:
    seconds = take_turns(calls, settings.effort)
    base = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, times in seconds.items():
        row = {"case": case, "of": of, "candidate": name}
        rows.append({**row, **summary(times, base)})
    return rows


def _missing(case, of: str, name: str, error: Exception) -> Row:
    reason = f"{type(error).__name__}: {error}"
    return {"case": case.name, "of": of, "candidate": name, "missing": reason}


SUITES: dict[str, Callable[[Settings], Iterator[Task]]] = {
    "dense": dense,
    "blocks": blocks,
    "video": video,
    "compile": compilation,
    "memory": memory,
    "tuner": tuner,
    "models": models,
    "packing": packing,
    "loss": loss,
    "mesh": on_mesh,
    "keras": keras,
    "operations": operations,
    "overhead": overhead,
}
