"""The pictures of a run: one for each suite that has something to show.

A title says what is seen, and is computed from the rows.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.drawing import (
    OURS,
    PEER,
    TEXT,
    draw_lines,
    draw_points,
    is_ours,
    log_scale,
    name_figure,
    name_marks,
    name_rows,
    new_figure,
    times,
)
from benchmarks.measure import is_control
from benchmarks.targets import geometric_mean

Row = dict[str, Any]
Ratios = dict[str, list[float]]
BOTH = {"with gradients": "gradient", "forward": "forward"}
MEANS = "Bars are geometric means, dots are cases. "

# Names for the candidates that are drawn; one name for several merges them.
VMAP = "vmap, JAX and Flax"
LAYERS = {
    "time_distributed, tuned": "tdjax, tuned", "time_distributed": "tdjax",
    "jax.vmap": VMAP, "flax nn.vmap": VMAP, "flax nnx.vmap": VMAP,
    "Haiku BatchApply": "Haiku", "Equinox, vmap twice": "Equinox",
    "flax nn.BatchApply": "Flax BatchApply", "Keras TimeDistributed": "Keras",
    "PyTorch": "PyTorch", "PyTorch, compiled": "PyTorch, compiled",
}  # fmt: skip
COMPILED = {
    "vmap": "tdjax", "loop over 8 blocks": "tdjax, chunked",
    "Keras TimeDistributed": "Keras",
}  # fmt: skip
LOSSES = {
    "linear_cross_entropy": "tdjax", "vocab_chunk_size=1024": "tdjax, vocab chunks",
    "PyTorch": "PyTorch",
}  # fmt: skip
MESH = {
    "tdjax": "tdjax", "tdjax, sharding left to the compiler": "left to XLA",
    "jax.vmap": "jax.vmap", "jax.vmap, padded": "padded",
    "nn.BatchApply": "BatchApply", "Optax, all logits": "Optax",
}  # fmt: skip
KERAS = {"Keras": "Keras", "drop-in": "tdjax.keras", "Flax conversion": "tdjax to_flax"}


def draw_all(out: Path, results: dict[str, Any]) -> None:
    """Writes `<suite>.png` for each suite that has something to show."""
    rows = [r for r in results["rows"] if "missing" not in r and not is_control(r)]
    with matplotlib.style.context("tdjax.plots"):
        for suite in dict.fromkeys(row["suite"] for row in rows):
            chosen = [row for row in rows if row["suite"] == suite]
            figure = PICTURES[suite](chosen, results["about"])
            if figure:
                draft = out / f".{suite}.png"
                figure.savefig(draft)
                draft.replace(out / f"{suite}.png")


def _draw_ratios(ax: Axes, names: list[str], ratios: Ratios) -> None:
    """Geometric means as bars from 1, with their numbers; each case is a dot."""
    at_right = {"transform": ax.get_yaxis_transform(), "va": "center"}
    for name in [name for name in names if name in ratios]:
        place, values = names.index(name), ratios[name]
        mean = geometric_mean(values)
        ax.barh(place, mean - 1, 0.7, left=1, color=OURS if is_ours(name) else PEER)
        ax.text(1.02, place, f"{mean:.2f}", **at_right)
        if len(values) > 1:
            ax.plot(values, [place] * len(values), "o", color="black", alpha=0.15, ms=3)
    ax.axvline(1, color="black", linewidth=0.8)


def grouped(rows: list[Row], names: dict[str, str]) -> dict[str, list[Row]]:
    """The rows of each name, in the order of `names`; no name without a row."""
    groups: dict[str, list[Row]] = {name: [] for name in names.values()}
    for row in rows:
        if row["candidate"] in names:
            groups[names[row["candidate"]]].append(row)
    return {name: found for name, found in groups.items() if found}


def ratios_to(base: str, rows: list[Row], names, column: str = "seconds") -> Ratios:
    """By name, the column in each case relative to the candidate `base` there."""
    case = lambda row: (row["case"], row["of"])
    rows = [row for row in rows if row.get(column)]
    bases = {case(row): row[column] for row in rows if row["candidate"] == base}
    groups = grouped([row for row in rows if case(row) in bases], names)
    ratio = lambda row: row[column] / bases[case(row)]
    return {name: list(map(ratio, found)) for name, found in groups.items()}


def _of(what: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["of"] == what]


def _ratio_figure(panels: dict[str, Ratios], label: str, names=None) -> Figure:
    """A row for each name of the first panel; `names` are longer names for them."""
    first, *_ = panels.values()
    share = {"sharex": True, "sharey": True}
    figure, axes = new_figure(list(panels), 1.8 + 0.3 * len(first), **share)
    for ax, ratios in zip(axes, panels.values()):
        _draw_ratios(ax, list(first), ratios)
        ax.set_xlabel(label)
    name_rows(axes[0], names or first)
    log_scale(axes[0].xaxis)
    return figure


def _beside_peers(rows: list[Row], about: Row) -> Figure:
    """Tuned and plain tdjax and the peers, relative to plain jnp."""
    both = [ratios_to("raw jnp", _of(of, rows), LAYERS) for of in BOTH.values()]
    panels, trained = dict(zip(BOTH, both)), both[0]
    groups = grouped(_of("gradient", rows), LAYERS)
    cases = {name: len({row["case"] for row in groups[name]}) for name in trained}
    most = max(cases.values())
    part = lambda n: "" if n == most else f" ({n} of {most} cases)"
    names = [f"{name}{part(n)}" for name, n in cases.items()]
    figure = _ratio_figure(panels, "time, raw jnp = 1", names)
    means = {n: geometric_mean(trained[n]) for n in trained if cases[n] == most}
    ours, what = means["tdjax, tuned"], rows[0]["suite"].capitalize()
    title = f"{what} with gradients: tuned tdjax takes {times([ours])} raw jnp's time"
    peers = {mean: name for name, mean in means.items() if not is_ours(name)}
    if peers and min(peers) < ours:
        title += f"; {peers[min(peers)]} takes {times([min(peers)])} it"
    elif peers:
        title += "; no peer takes less"
    return name_figure(figure, title, about, MEANS)


def draw_compile_time(rows: list[Row], about: Row) -> Figure:
    """Seconds to compile the gradient of Dense, by the number of steps."""
    rows = [row for row in _of("gradient", rows) if row["suite"] == "compile"]
    point = lambda row: (row["timesteps"], row["compile_seconds"])
    lines = {n: list(map(point, found)) for n, found in grouped(rows, COMPILED).items()}
    figure, (ax,) = new_figure([""], 4.2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    draw_lines(ax, lines, ("Keras",))
    ax.xaxis.set_major_formatter("{x:.0f}")
    log_scale(ax.yaxis)
    ax.set(xlabel="steps", ylabel="seconds to compile the gradient of Dense")
    growth = {name: max(line)[1] / min(line)[1] for name, line in lines.items()}
    title = "Compile time stays flat"
    if growth["tdjax"] >= 1.5:
        title = f"Compile time grows {growth['tdjax']:.1f} times with the sequence"
    if growth.get("Keras", 1) >= 1.5:
        title += "; Keras' grows with the sequence"
    return name_figure(figure, title, about)


def _memory(rows: list[Row], about: Row) -> Figure | None:
    """Time against memory, a panel for each case."""
    rows = [row for row in rows if row.get("temporary_bytes")]
    if not rows:
        return None
    cases = {row["case"]: row["case"].removeprefix("conv net, ") for row in rows}
    figure, axes = new_figure(list(cases.values()), 3.9)
    for ax, case in zip(axes, cases):
        _draw_trades(ax, [row for row in rows if row["case"] == case])
    axes[0].set_ylabel("time, all steps at once = 1")
    names = {row["candidate"]: row["candidate"] for row in rows}
    memory = ratios_to(rows[0]["candidate"], rows, names, "temporary_bytes")
    seconds = ratios_to(rows[0]["candidate"], rows, names)
    # Of those that all cases have.
    least = min(memory, key=lambda n: (-len(memory[n]), geometric_mean(memory[n])))
    title = f"The conv net's gradient with {least} takes {times(memory[least])} the"
    title += f" memory and {times(seconds[least])} the time"
    return name_figure(figure, title, about)


def _draw_trades(ax: Axes, rows: list[Row]) -> None:
    """Those that no other beats in both time and memory are joined by a line."""
    places = {r["candidate"]: (r["temporary_bytes"] / 1e6, r["ratio"]) for r in rows}
    best: dict[str, tuple[float, float]] = {}
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if all(place[1] < time for _, time in best.values()):
            best[name] = place
    whole, least, fastest = next(iter(places)), next(iter(best)), list(best)[-1]
    ax.plot(*zip(*places.values()), "o", color=OURS, alpha=0.3)
    ax.plot(*zip(*best.values()), "o-", color=OURS)
    ax.plot(*places[whole], "s", color=TEXT)
    # Where no point is: left of the least memory, below the least time, right of all.
    sides = {fastest: (0, -8, "center", "top"), least: (-8, 0, "right", "center")}
    sides[whole] = (8, 0, "left", "center")
    for name, (x, y, ha, va) in sides.items():
        text = textwrap.fill(name.removeprefix("vmap, "), 14)
        color = TEXT if name == whole else OURS
        look: dict[str, Any] = {"color": color, "size": 10, "ha": ha, "va": va}
        ax.annotate(text, places[name], (x, y), textcoords="offset points", **look)
    low, high = min(places.values())[0], max(places.values())[0]
    ax.set_xlim(low * (low / high) ** 1.3, high * (high / low) ** 0.9)
    ax.margins(y=0.3)
    ax.set_xlabel("temporary memory, MB")
    log_scale(ax.xaxis)


def _tuner(rows: list[Row], about: Row) -> Figure:
    """Every choice as a faint dot, with the default and the tuner's pick."""
    cases: dict[str, list[Row]] = {}
    for row in [*_of("gradient", rows), *_of("forward", rows)]:
        cases.setdefault(f"{row['case']}, {row['of']}", []).append(row)
    figure, (ax,) = new_figure([" "], 1.9 + 0.4 * len(cases))
    points = {kind: [] for kind in ("others", "default", "pick")}
    for place, found in enumerate(cases.values()):
        best = min(row["ratio"] for row in found if "behind" not in row)
        for row in found:
            kind = "default" if row is found[0] else "others"
            kind = "pick" if row["chosen"] else kind
            point = row.get("behind", row["ratio"] / best), place
            points[kind] += [point] * max(1, len(row["chosen"]))
    draw_points(ax, points["others"], "o", "0.7", ms=4, label="others")
    draw_points(ax, points["default"], "s", TEXT, ms=7, label="default")
    draw_points(ax, points["pick"], "o", OURS, ms=9, label="picks")
    name_rows(ax, cases)
    ax.set_xlabel("time, the fastest choice = 1")
    log_scale(ax.xaxis)
    name_marks(ax)
    lost = [ratio for ratio, _ in points["pick"]]
    near = f"{sum(ratio <= 1.1 for ratio in lost)} of {len(lost)} picks of the tuner"
    title = f"{near} are within 1.1 times the fastest choice"
    return name_figure(figure, f"{title}, at worst {max(lost):.2f} times", about)


def _models(rows: list[Row], about: Row) -> Figure:
    """Whole models, relative to what they were given as."""
    names = {"tuned as a whole": "tuned", '"auto", no table': '"auto"'}
    kinds = dict.fromkeys(row["of"] for row in rows)
    panels = {of: ratios_to("as given", _of(of, rows), names) for of in kinds}
    figure = _ratio_figure(panels, "time, the model as it was given = 1")
    steps = panels.get("training step", next(iter(panels.values())))["tuned"]
    took = f"{geometric_mean(steps):.2f} of the time"
    return name_figure(figure, f"A tuned model takes {took} for a step", about)


def _packing(rows: list[Row], about: Row) -> Figure:
    """Time against the share of valid steps, beside a time in proportion to it."""
    rows = [row for row in rows if row["candidate"] == "packed"]
    figure, axes = new_figure(list(BOTH), 3.9, sharey=True)
    for ax, of in zip(axes, BOTH.values()):
        lines: dict[str, list] = {}
        for row in _of(of, rows):
            point = row["capacity_share"], row["ratio"]
            lines.setdefault(row["layer"], []).append(point)
        lines["in proportion"] = [(0, 0), (1, 1)]
        draw_lines(ax, lines, ("in proportion",))
        ax.set_xlabel("share of valid steps")
    axes[0].set_ylabel("time, padded = 1")
    share = min((row["share"] for row in rows), key=lambda share: abs(share - 0.3))
    taken = [row["ratio"] for row in _of("gradient", rows) if row["share"] == share]
    title = f"Packed, a batch that is {100 * share:.0f} % valid takes {times(taken)}"
    return name_figure(figure, f"{title} the padded time", about)


def _loss(rows: list[Row], about: Row) -> Figure:
    """The fused loss relative to Optax on all logits."""
    base, trained = "Optax, all logits", _of("gradient", rows)
    time = ratios_to(base, trained, LOSSES)
    memory = ratios_to(base, trained, LOSSES, "temporary_bytes")
    panels = {"time, gradient": time, "memory, gradient": memory}
    panels["time, forward"] = ratios_to(base, _of("forward", rows), LOSSES)
    figure = _ratio_figure(panels, "Optax = 1")
    title = f"The fused loss takes {times(time['tdjax'])} Optax' time"
    title += f" and {times(memory['tdjax'])} its memory" if memory else ""
    return name_figure(figure, title, about, MEANS)


def _operations(rows: list[Row], about: Row) -> Figure | None:
    """PyTorch's operations relative to XLA's, a bar for each."""
    ratios = {r["case"]: [r["ratio"]] for r in rows if r["candidate"] == "PyTorch"}
    if not ratios:
        return None
    figure = _ratio_figure({"": ratios}, "time of PyTorch, XLA = 1")
    taken = times([ratio for (ratio,) in ratios.values()])
    return name_figure(figure, f"PyTorch's operations take {taken} XLA's time", about)


def _overhead(rows: list[Row], about: Row) -> Figure:
    """Ways to call an NNX layer, relative to the layer alone."""
    calls = {r["candidate"]: 1e6 * r["seconds"] for r in _of("forward", rows)}
    alone, *others = calls
    ratios = {name: [calls[name] / calls[alone]] for name in others}
    figure = _ratio_figure({"": ratios}, f"time of a call; {alone} = 1")
    added = calls["nnx.jit, tdjax.nnx"] - calls[alone]
    adds = f"adds {added:.0f} µs" if added >= 1 else "adds no time"
    split = calls["jax.jit after nnx.split, tdjax.nnx"]
    title = f"tdjax {adds} to the call of an NNX layer, which takes {calls[alone]:.0f}"
    title += f" alone; after nnx.split it all takes {split:.0f} µs"
    return name_figure(figure, title, about)


def _keras(rows: list[Row], about: Row) -> Figure:
    """The first call and a later step, a row for each model and what it does."""
    name = lambda row: f"{row['model']}, {row['timesteps']} steps, {row['of']}"
    places = list(dict.fromkeys(map(name, [*_of("fit", rows), *_of("predict", rows)])))
    figure, axes = new_figure([" ", " "], 2 + 0.27 * len(places), sharey=True)
    titles = {"first_seconds": "first call, seconds", "seconds": "later step, seconds"}
    for ax, (column, title) in zip(axes, titles.items()):
        for label, found in grouped(rows, KERAS).items():
            points = [(row[column], places.index(name(row))) for row in found]
            look = dict(zip(KERAS.values(), [("s", TEXT), ("o", OURS), ("D", OURS)]))
            fill = {"mfc": "none"} if "flax" in label else {}
            draw_points(ax, points, *look[label], label=label, **fill)
        ax.grid(axis="y", color="0.92")
        ax.set_xlabel(title)
        log_scale(ax.xaxis)
    name_rows(axes[0], places)
    name_marks(axes[0])
    ratios = [ratios_to("Keras", rows, KERAS, column) for column in titles]
    title = "Keras models with tdjax.keras; Keras' own layer was not run"
    if all("tdjax.keras" in each for each in ratios):
        first, later = (times([geometric_mean(r["tdjax.keras"])]) for r in ratios)
        title = f"With tdjax.keras, the first call takes {first} Keras' time, "
        title += f"later steps {later} it"
    return name_figure(figure, title, about, "No square: Keras was not run there. ")


def _mesh(rows: list[Row], about: Row) -> Figure:
    """What a device sends and computes in the gradient, by the number of devices."""
    panels = {
        "conv net: MB sent": ("conv net, examples split", "sent_bytes"),
        "packed block: Mflop": ("transformer block, packed", "device_flops"),
        "loss: MB sent": ("loss, examples split", "sent_bytes"),
    }
    figure, axes = new_figure(list(panels), 3.9)
    lines = [_by_devices(rows, *panel) for panel in panels.values()]
    for ax, found in zip(axes, lines):
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="devices", xlim=(1.7, 40))
        if found:
            draw_lines(ax, found, tuple(name for name in found if name != "tdjax"))
        ax.set_xticks([2, 4, 8], ["2", "4", "8"])
        ax.margins(y=0.15)
        log_scale(ax.yaxis)
    sent = {name: dict(line) for name, line in lines[2].items()}
    most, least = max(sent["tdjax"]), min(sent["tdjax"])
    growth = sent["tdjax"][most] / sent["tdjax"][least]
    amount = "the same" if growth < 1.01 else f"{growth:.1f} times as much"
    title = f"With sharding=, the loss sends {amount} on {most} devices as on {least}"
    if "left to XLA" in sent:
        other = sent["left to XLA"][most] / sent["tdjax"][most]
        title += f"; without, {other:.1f} times as much"
    return name_figure(figure, title, about, "Each has as many examples. ")


def _by_devices(rows: list[Row], case: str, column: str) -> dict[str, list]:
    """Points of a line for each candidate; one device sends nothing."""
    lines: dict[str, list] = {}
    for row in _of("gradient", rows):
        if row["case"].startswith(case) and row["devices"] > 1 and row.get(column):
            point = row["devices"], row[column] / 1e6
            lines.setdefault(MESH[row["candidate"]], []).append(point)
    if lines.get("left to XLA") == lines.get("jax.vmap"):
        lines.pop("left to XLA", None)
    return lines


PICTURES: dict[str, Callable[[list[Row], Row], Figure | None]] = {
    "dense": _beside_peers, "blocks": _beside_peers, "video": _beside_peers,
    "compile": draw_compile_time, "memory": _memory, "tuner": _tuner,
    "packing": _packing, "loss": _loss, "keras": _keras, "mesh": _mesh,
    "operations": _operations, "overhead": _overhead, "models": _models,
}  # fmt: skip
