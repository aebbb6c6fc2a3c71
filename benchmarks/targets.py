"""What the project promises, each beside the figure that a run gives."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.measure import is_control, original
from benchmarks.vocabularies import FLOOR

Row = dict[str, Any]
TUNED = "time_distributed, tuned"
VMAP = "time_distributed"
OURS = ("time_distributed", "tdjax")
# Below this, a measurement is one of the dispatch.
_DISPATCH = 100e-6


class Promise(NamedTuple):
    """What is promised, and the figure for it from the rows of some suites.

    `is_of_time` is False for bytes and deviations, which have no noise; `takes` says
    which rows of the suites it is about.
    """

    measure: str
    target: str
    answer: Callable[[list[Row]], str]
    suites: tuple[str, ...]
    is_of_time: bool = True
    takes: Callable[[Row], bool] = lambda row: True


def answers(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """`(measure, target, figure, noise)` of each promise that the rows can answer."""
    rows = [row for row in rows if "missing" not in row]
    found = []
    for promise in PROMISES:
        chosen = [row for row in rows if row["suite"] in promise.suites]
        chosen = [row for row in chosen if promise.takes(row)]
        figure = promise.answer([row for row in chosen if not is_control(row)])
        if figure:
            spread = noise(chosen) if promise.is_of_time else ""
            found.append((promise.measure, promise.target, figure, spread))
    return found


def noise(rows: list[Row]) -> str:
    """Between which ratios a program is to itself, in the same cases."""
    ratios = []
    for case in _cases(rows, tuple({row["suite"] for row in rows})):
        for name, row in case.items():
            first = case.get(original(name), {})
            if is_control(row) and row.get("seconds") and first.get("seconds"):
                ratios.append(row["seconds"] / first["seconds"])
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""


def _cases(rows: Iterable[Row], suites: tuple[str, ...]) -> list[dict[str, Row]]:
    cases: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["suite"] in suites:
            cases[row["suite"], row["case"], row["of"]][row["candidate"]] = row
    return list(cases.values())


_PEERS = ("dense", "blocks", "video")
# Searches of the tuner suite, and candidates of tracing.
ALONE, BUSY = ("first", "second"), ("beside two busy processes",)
TABLE, FIXED = '"auto" in a table', "fixed options"


def _dense_and_raw(rows: list[Row]) -> str:
    cases = _cases(rows, ("dense",))
    big = [case for case in cases if case["raw jnp"]["seconds"] > _DISPATCH]
    return _spread([case[VMAP]["ratio"] for case in big], 1.03)


def _compile_growth(rows: list[Row]) -> str:
    figures = []
    for name in ("vmap", "fold"):
        for of in ("forward", "gradient"):
            seconds = {
                row["timesteps"]: row["compile_seconds"]
                for row in rows
                if row["suite"] == "compile"
                and (row["candidate"], row["of"]) == (name, of)
            }
            if len(seconds) > 1:
                growth = seconds[max(seconds)] / seconds[min(seconds)]
                figures.append(f"{name}, {of}: {growth:.2f} times")
    return "; ".join(figures)


def _against_keras(rows: list[Row]) -> str:
    pairs = [
        (case["Keras TimeDistributed"], case[TUNED])
        for case in _cases(rows, _PEERS)
        if "Keras TimeDistributed" in case and case[TUNED]["timesteps"] >= 128
    ]
    if not pairs:
        return ""
    times = lambda what: geometric_mean(a[what] / b[what] for a, b in pairs)
    run, build = times("seconds"), times("compile_seconds")
    return f"run {run:.1f}, compile {build:.0f} times faster ({len(pairs)} cases)"


def _conv_and_vmap(rows: list[Row]) -> str:
    figures = [
        f"{case[VMAP]['case']}, {case[VMAP]['of']}: "
        f"{case[VMAP]['seconds'] / case[TUNED]['seconds']:.2f}"
        for case in _cases(rows, ("video",))
    ]
    return "; ".join(figures)


def _against_peers(rows: list[Row], torch: bool) -> str:
    ratios = {}
    for case in _cases(rows, _PEERS):
        peers = [
            row["seconds"]
            for name, row in case.items()
            if not name.startswith(OURS) and ("PyTorch" in name) == torch
        ]
        if peers and case[TUNED]["seconds"] > _DISPATCH:
            name = f"{case[TUNED]['case']}, {case[TUNED]['of']}"
            ratios[name] = case[TUNED]["seconds"] / min(peers)
    if not ratios:
        return ""
    worst = max(ratios, key=lambda name: ratios[name])
    return f"{_spread(list(ratios.values()), 1.1)}; worst: {worst}"


def _chunked(rows: list[Row]) -> str:
    figures = []
    for case in _cases(rows, ("memory",)):
        whole = case["vmap, all steps at once"]
        size = max(1, whole["timesteps"] // 8)
        row = case[f"chunk_size={size}, remat=True"]
        time = row["seconds"] / whole["seconds"]
        room = row["temporary_bytes"] / whole["temporary_bytes"]
        figures.append(
            f"{row['case']}: {time:.2f} times the time, {room:.2f} of the memory"
        )
    return "; ".join(figures)


def _packed(rows: list[Row]) -> str:
    figures = []
    for case in _cases(rows, ("packing",)):
        padded = case["padded"]
        if padded["share"] == 0.3:
            ratio = _best(case, "packed") / _best(case, "padded")
            figures.append(f"{padded['layer']}, {padded['of']}: {ratio:.2f}")
    return "; ".join(figures)


def _best(case: dict[str, Row], kind: str) -> float:
    return min(row["seconds"] for name, row in case.items() if name.startswith(kind))


FUSED, OPTAX = "linear_cross_entropy", "Optax, all logits"
PLAIN = "plain JAX, all logits"


def _loss(
    of: str, name: str, base: str, what: str = "seconds"
) -> Callable[[list[Row]], str]:
    """The ratio of two candidates of the loss suite, for each case."""

    def answer(rows: list[Row]) -> str:
        figures = []
        for case in _cases(rows, ("loss",)):
            ours, other = case.get(name, {}), case.get(base, {})
            if ours.get("of") == of and ours.get(what) and other.get(what):
                figures.append(f"{ours['case']}: {ours[what] / other[what]:.2f}")
        return "; ".join(figures)

    return answer


def _budget(rows: list[Row]) -> str:
    used = [max(row["spent"].values()) / row["budget"] for row in rows]
    return f"at most {max(used):.2f} of the budget" if used else ""


def _is_beside(row: Row) -> bool:
    """Whether it was timed beside busy processes."""
    return any(row["of"].endswith(search) for search in BUSY)


def _picks(rows: list[Row]) -> str:
    """The picks' times as multiples of the fastest's in the same rounds."""
    ratios = []
    for case in _cases(rows, ("tuner",)):
        finals = [row for row in case.values() if "behind" not in row]
        best = min(row["ratio"] for row in finals)
        ratios += [row["ratio"] / best for row in finals for _ in row["chosen"]]
    return _spread(ratios, 1.05)


def _picks_and_default(rows: list[Row]) -> str:
    ratios = []
    for case in _cases(rows, ("tuner",)):
        ratios += [row["ratio"] for row in case.values() for _ in row["chosen"]]
    return _spread(ratios, 1.03)


def _whole_models(rows: list[Row]) -> str:
    return _ratios_of("tuned as a whole", "as given", rows, "training step")


def _rules(rows: list[Row]) -> str:
    return _ratios_of('"auto", no table', "as given", rows)


def _ratios_of(ours: str, base: str, rows: list[Row], of: str = "") -> str:
    figures = []
    for row in rows:
        same = [r for r in rows if (r["case"], r["of"]) == (row["case"], row["of"])]
        bases = [each["seconds"] for each in same if each["candidate"] == base]
        if row["candidate"] == ours and bases and of in row["of"]:
            name = row["case"] if of else f"{row['case']}, {row['of']}"
            figures.append(f"{name}: {row['seconds'] / bases[0]:.2f}")
    return "; ".join(figures)


def _lookups(rows: list[Row]) -> str:
    traced = {row["candidate"]: row for row in rows if row["of"] == "tracing"}
    if not traced:
        return ""
    more = traced[TABLE]["seconds"] - traced[FIXED]["seconds"]
    return f"{1e3 * more / traced[TABLE]['layers']:.2f} ms"


def _first_predict(rows: list[Row]) -> str:
    for case in _cases(rows, ("keras",)):
        row = case["drop-in"]
        if _is_dense(row, 1024) and row["of"] == "predict" and "Keras" in case:
            slow, fast = case["Keras"]["first_seconds"], row["first_seconds"]
            return f"{slow / fast:.0f} times: {slow:.1f} s and {fast:.2f} s"
    return ""


def _is_dense(row: Row, timesteps: int) -> bool:
    return row["model"] == "Dense(64)" and row["timesteps"] == timesteps


def _keras_growth(rows: list[Row]) -> str:
    figures = []
    for of in ("predict", "fit"):
        ours = [
            case["drop-in"]
            for case in _cases(rows, ("keras",))
            if case["drop-in"]["of"] == of
        ]
        short = [row["compile_seconds"] for row in ours if _is_dense(row, 16)]
        long = [row["compile_seconds"] for row in ours if _is_dense(row, 4096)]
        figures += [f"{of}: {b / a:.2f} times" for a, b in zip(short, long)]
    return "; ".join(figures)


def _keras_fit(rows: list[Row]) -> str:
    times = {
        row["case"]: case["Keras"]["seconds"] / row["seconds"]
        for case in _cases(rows, ("keras",))
        for row in [case["drop-in"]]
        if "Keras" in case and row["of"] == "fit" and row["timesteps"] >= 128
    }
    if not times:
        return ""
    each = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in times.items())
    return f"geometric mean {geometric_mean(times.values()):.2f}; {each}"


def _keras_deviation(rows: list[Row]) -> str:
    found = [
        row["deviation"]
        for case in _cases(rows, ("keras",))
        for row in case.values()
        if "Keras" in case
    ]
    return f"at most {max(found):.1e}" if found else ""


def _spread(ratios: list[float], target: float) -> str:
    if not ratios:
        return ""
    within = sum(ratio <= target for ratio in ratios)
    return (
        f"geometric mean {geometric_mean(ratios):.2f}, largest {max(ratios):.2f}; "
        f"{within} of {len(ratios)} within {target}"
    )


def geometric_mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def _on_mesh(rows: list[Row]) -> str:
    """What a device sends on the most devices, relative to two of them."""
    sent: dict[str, dict[int, int]] = defaultdict(dict)
    for row in rows:
        about = row["suite"], row["of"], row["candidate"]
        if about == ("mesh", "gradient", "tdjax") and row["devices"] > 1:
            sent[row["case"]][row["devices"]] = row["sent_bytes"]
    growths = [each[max(each)] / each[min(each)] for each in sent.values()]
    return _spread(growths, 1.0) if len(growths) > 1 else ""


# Of the loss: what, the target, and of which rows ours is to which other.
_LOSS = [
    (
        "`linear_cross_entropy` against Optax on all logits, forward",
        "at most 0.5 times at 32,000 words, 1 from 8,000",
        ("forward", FUSED, OPTAX),
    ),
    ("the same, gradient", "at most 1 times", ("gradient", FUSED, OPTAX)),
    (
        "the same, temporary memory of the gradient",
        "at most 0.125 times at 32,000 words",
        ("gradient", FUSED, OPTAX, "temporary_bytes"),
    ),
    (
        "the same against three products in chunks, which no gradient can leave out",
        "at most 1.1 times at 32,000 words and more",
        ("gradient", FUSED, FLOOR),
    ),
    (
        "with all options, against none",
        "at most 1.1 times",
        ("gradient", "all options", FUSED),
    ),
    (
        "with a tied embedding, against a kernel",
        "at most 1.05 times",
        ("gradient", "tied embedding", FUSED),
    ),
    (
        "against a checkpointed scan over chunks",
        "at most 1 times",
        ("gradient", FUSED, "scan over chunks, checkpointed"),
    ),
    (
        "against PyTorch's `linear_cross_entropy` in chunks",
        "at most 0.5 times in float32, 0.9 in bfloat16",
        ("gradient", FUSED, "PyTorch, chunked"),
    ),
    (
        "a batch that is 30 % valid, packed, against padded",
        "at most 0.4 times",
        ("gradient, 30 % valid", "packed", "padded"),
    ),
    (
        "the same, temporary memory",
        "at most 0.4 times",
        ("gradient, 30 % valid", "packed", "padded", "temporary_bytes"),
    ),
    (
        "`linear_log_probs`, gradient, against that of the loss",
        "at most 1.4 times",
        ("gradient of log-probabilities", "linear_log_probs", FUSED),
    ),
    (
        "the same, against plain JAX on all logits",
        "at most 1 times",
        ("gradient of log-probabilities", "linear_log_probs", PLAIN),
    ),
]
PROMISES = [
    Promise(
        "`time_distributed(dense)` against raw `x @ w + b`, above 100 µs",
        "at most 1.03 times",
        _dense_and_raw,
        ("dense",),
    ),
    Promise(
        "compile time at 4096 steps against 16 steps",
        "at most 1.2 times",
        _compile_growth,
        ("compile",),
    ),
    Promise(
        "against Keras 3 on JAX, at least 128 steps",
        "run 1.7, compile 20 times faster",
        _against_keras,
        _PEERS,
    ),
    Promise(
        "tuned conv net against plain `vmap`",
        "at least 2 times faster",
        _conv_and_vmap,
        ("video",),
    ),
    Promise(
        "tuned against the best JAX peer, above 100 µs",
        "at most 1.1 times",
        lambda rows: _against_peers(rows, torch=False),
        _PEERS,
    ),
    Promise(
        "tuned against PyTorch, above 100 µs",
        "at most 1.1 times",
        lambda rows: _against_peers(rows, torch=True),
        _PEERS,
    ),
    Promise(
        "chunked conv net gradient, an eighth of the activations, against unchunked",
        "at most 1.3 times",
        _chunked,
        ("memory",),
    ),
    Promise(
        "the tuner's pick against the best fixed choice, two searches",
        "at most 1.05 times",
        _picks,
        ("tuner",),
        takes=lambda row: not _is_beside(row),
    ),
    Promise(
        "the same, searched and run beside two busy processes",
        "at most 1.05 times",
        _picks,
        ("tuner",),
        takes=_is_beside,
    ),
    Promise(
        "the tuner's pick against the default, all searches",
        "at most 1.03 times",
        _picks_and_default,
        ("tuner",),
    ),
    Promise(
        "the tuner's own time",
        "at most 1.2 of its budget",
        _budget,
        ("tuner",),
        is_of_time=False,
    ),
    Promise(
        "a training step of a video model (conv net, GRU, head), tuned as a whole",
        "at most 0.7 times untuned",
        _whole_models,
        ("models",),
    ),
    Promise(
        '`method="auto"` without a table against `"vmap"`',
        "at most 1 times",
        _rules,
        ("models",),
    ),
    Promise(
        '`method="auto"` with a table: tracing takes longer than with fixed options by',
        "at most 1 ms for each layer",
        _lookups,
        ("overhead",),
    ),
    Promise(
        "a batch that is 30 % valid, packed, against padded",
        "at most 0.4 times",
        _packed,
        ("packing",),
    ),
    *(
        Promise(what, target, _loss(*which), ("loss",), which[-1] != "temporary_bytes")
        for what, target, which in _LOSS
    ),
    Promise(
        "with `sharding`, bytes that a device sends on 8 devices, against 2",
        "at most 1 times",
        _on_mesh,
        ("mesh",),
        is_of_time=False,
    ),
    Promise(
        "Keras drop-in, first `predict` of Dense(64) over 1024 steps, against Keras",
        "at least 20 times sooner",
        _first_predict,
        ("keras",),
    ),
    Promise(
        "Keras drop-in, compile time at 4096 steps against 16 steps",
        "at most 1.2 times",
        _keras_growth,
        ("keras",),
    ),
    Promise(
        "Keras drop-in, a step of `fit` against Keras, at least 128 steps",
        "at least 1.7 times faster",
        _keras_fit,
        ("keras",),
    ),
    Promise(
        "drop-in and Flax conversion against Keras, outputs and trained weights",
        "at most 1e-5 apart, relative",
        _keras_deviation,
        ("keras",),
        is_of_time=False,
    ),
]
