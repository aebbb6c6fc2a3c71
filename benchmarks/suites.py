"""The suites: each yields rows, which `python -m benchmarks` writes down."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from benchmarks import cases, dispatch, kernels, ours, peers
from benchmarks.candidate import Candidate
from benchmarks.measure import Effort, measure, take_turns

Row = dict[str, Any]
BOTH = ("forward", "gradient")


class Settings(NamedTuple):
    """Small shapes and few rounds (`quick`), or the real thing."""

    quick: bool = False

    @property
    def effort(self) -> Effort:
        return Effort(0.2, 2) if self.quick else Effort(6.0, 15)

    def budget(self, layer: str) -> float:
        """Seconds for the tuner: what compiles and runs longer gets more."""
        if self.quick:
            return 0.3
        return {"Dense": 4.0, "conv net": 30.0}.get(layer, 12.0)


def dense(settings: Settings) -> Iterator[Row]:
    """Dense over a grid of shapes and dtypes, against all peers and the roofline."""
    for case in cases.dense_grid(settings.quick):
        for of in BOTH:
            for row in _beside_peers(case, of, settings):
                flops, moved = cases.dense_floor_work(case, of)
                yield {
                    **row,
                    "flops": flops,
                    "bytes": moved,
                    "dtype": str(case.x.dtype),
                }


def blocks(settings: Settings) -> Iterator[Row]:
    """MLP, LayerNorm block, attention inside each step, GRU with a head."""
    for case in cases.blocks(settings.quick):
        for of in BOTH:
            yield from _beside_peers(case, of, settings)


def video(settings: Settings) -> Iterator[Row]:
    """A conv net over the frames of a video."""
    for case in cases.videos(settings.quick):
        for of in BOTH:
            yield from _beside_peers(case, of, settings)


def _beside_peers(case, of: str, settings: Settings) -> list[Row]:
    tuned = ours.tune(case, of, settings.budget(case.layer))
    pick = ours.transform(case, "time_distributed, tuned", **tuned.options)
    floor, *others = peers.NAMES
    skip = ("torch_compiled",) if settings.quick else ()
    others = [name for name in others if name not in skip]
    candidates = [floor, pick, *ours.fixed(case), *others]
    rows = measure(case, of, candidates, settings.effort)
    return [{**row, "options": tuned.options} for row in rows]


def compilation(settings: Settings) -> Iterator[Row]:
    """Time to trace and compile Dense against the number of steps."""
    times = (16, 64) if settings.quick else (16, 64, 256, 1024, 4096)
    for timesteps in times:
        case = cases.make_case("Dense", (4, timesteps, 32))
        candidates: list[Candidate] = [
            ours.transform(case, "vmap"),
            ours.transform(case, "fold", method="fold"),
            ours.transform(case, "loop over 8 blocks", chunk_size=timesteps // 8),
            peers.make("raw", case),
        ]
        for of in BOTH:
            # It unrolls: 1024 steps take it minutes, and the gradient many.
            most = 16 if settings.quick else {"forward": 1024, "gradient": 256}[of]
            try:
                keras = [peers.keras_module().candidate(case, most)]
            except (ImportError, NotImplementedError) as error:
                keras = []
                yield _missing(case, of, "Keras TimeDistributed", error)
            yield from _compile_rows(case, of, [*candidates, *keras])


def _compile_rows(case, of: str, candidates: list[Candidate]) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {each.name: [] for each in candidates}
    for attempt in range(5):
        for each in candidates:
            slow = attempt and seconds[each.name][0] > 2
            if not slow:
                jax.clear_caches()
                seconds[each.name].append(each.compile(case, of).compile_seconds)
    for name, each in seconds.items():
        row = {"case": case.name, "timesteps": case.timesteps, "of": of}
        yield {**row, "candidate": name, "compile_seconds": statistics.median(each)}


def memory(settings: Settings) -> Iterator[Row]:
    """The conv net's gradient: time and memory against chunk size."""
    for case in cases.videos(settings.quick):
        sizes = [2**n for n in range(int(math.log2(case.timesteps)))]
        candidates = [ours.transform(case, "vmap, all steps at once")]
        for size in reversed(sizes):
            for remat in (False, True):
                name = f"chunk_size={size}, remat={remat}"
                options = {"chunk_size": size, "remat": remat}
                candidates.append(ours.transform(case, name, **options))
        kept = math.prod(case.cotangent.shape) * case.cotangent.dtype.itemsize * 3
        for row in measure(case, "gradient", candidates, settings.effort):
            yield {**row, "activation_bytes": kept}


def tuner(settings: Settings) -> Iterator[Row]:
    """The tuner's pick beside every fixed choice, timed again, and its own time."""
    conv = cases.videos(settings.quick)[0]
    mlp = cases.blocks(settings.quick)[0]
    for case in (mlp,) if settings.quick else (mlp, conv):
        for of in BOTH:
            budget = 2.0 if settings.quick else 20.0
            start = time.perf_counter()
            tuning = ours.tune(case, of, budget)
            spent = time.perf_counter() - start
            timed = [each for each in tuning.candidates if each.run_seconds]
            candidates = [
                ours.transform(case, str(each), **each.options) for each in timed
            ]
            for row in measure(case, of, candidates, settings.effort):
                chosen = row["candidate"] == str(tuning.best)
                yield {**row, "chosen": chosen, "budget": budget, "spent": spent}


def operations(settings: Settings) -> Iterator[Row]:
    """Single products and convolutions, by XLA and by PyTorch: beyond any lowering."""
    for name, calls in kernels.calls(settings.quick).items():
        seconds = take_turns(calls, settings.effort)
        yield from _time_rows(name, "one operation", seconds)


def overhead(settings: Settings) -> Iterator[Row]:
    """One call from Python, not under jit: NNX modules, with and without a wrapper."""
    seconds = take_turns(dispatch.calls(), settings.effort)
    yield from _time_rows("one call of an NNX Dense", "forward", seconds)


def _time_rows(case: str, of: str, seconds: dict[str, list[float]]) -> Iterator[Row]:
    base = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        yield {
            "case": case,
            "of": of,
            "candidate": name,
            "ratio": median / base,
            "quartiles": [low / base, high / base],
            "seconds": median,
        }


def smoke(settings: Settings) -> Iterator[Row]:
    """Every suite on small shapes: that all run, and that all peers agree."""
    for name, suite in SUITES.items():
        for row in suite(Settings(quick=True)):
            yield {**row, "suite": name}


def _missing(case, of: str, name: str, error: Exception) -> Row:
    reason = f"{type(error).__name__}: {error}"
    return {"case": case.name, "of": of, "candidate": name, "missing": reason}


SUITES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "dense": dense,
    "blocks": blocks,
    "video": video,
    "compile": compilation,
    "memory": memory,
    "tuner": tuner,
    "operations": operations,
    "overhead": overhead,
}
