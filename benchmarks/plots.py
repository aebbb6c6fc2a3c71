"""The pictures of a run: one for each suite that has something to show.

They are drawn in the project's style, `src/tdjax/plots.mplstyle`: tdjax in the one
strong colour, peers in greys. A title says what is seen, and is computed from the rows.
"""

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.targets import geometric_mean

Row = dict[str, Any]
Ratios = dict[str, list[float]]
OURS, TEXT, PEER = "C0", "C1", "C2"
BOTH = {"with gradients": "gradient", "forward": "forward"}
MEANS = "Bars are geometric means, dots are cases. "

# Names for the candidates that are drawn; one name for several merges them.
VMAP = "vmap, JAX and Flax"
LAYERS = {
    "time_distributed, tuned": "tdjax, tuned", "time_distributed": "tdjax",
    "jax.vmap": VMAP, "flax nn.vmap": VMAP, "flax nnx.vmap": VMAP,
    "Haiku BatchApply": "Haiku", "Equinox, vmap twice": "Equinox",
    "Keras TimeDistributed": "Keras",
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
KERAS = {"Keras": "Keras", "drop-in": "tdjax.keras", "Flax conversion": "tdjax to_flax"}


def draw_all(out: Path, results: dict[str, Any]) -> None:
    """Writes `<suite>.png` for each suite that has something to show."""
    rows = [row for row in results["rows"] if "missing" not in row]
    with matplotlib.style.context("tdjax.plots"):
        for suite in dict.fromkeys(row["suite"] for row in rows):
            chosen = [row for row in rows if row["suite"] == suite]
            figure = PICTURES[suite](chosen, results["about"])
            if figure:
                draft = out / f".{suite}.png"
                figure.savefig(draft)
                draft.replace(out / f"{suite}.png")


def new_figure(titles: list[str], height: float, **share) -> tuple[Figure, list[Axes]]:
    """As wide as a page, with a panel for each title."""
    figure = Figure(figsize=(7.5, height))
    axes = list(figure.subplots(1, len(titles), squeeze=False, **share)[0])
    for ax, title in zip(axes, titles):
        ax.set_title(title, size=11, weight="normal")
    return figure, axes


def name_figure(figure: Figure, title: str, about: Row, note: str = "") -> Figure:
    """Says what the figure shows; below, a note, the machine and the versions."""
    machine = f"{about['cores']} CPU cores" if about["cores"] else about["device"]
    quick = "A quick run: its times mean nothing. " if about["quick"] else ""
    versions = [f"{n} {v}" for n, v in about["versions"].items() if n != "jaxlib"]
    small = f"{quick}{note}{machine}, {', '.join(versions)}"
    wrap = lambda text, width: textwrap.fill(text, width, break_on_hyphens=False)
    left = {"x": 0.01, "ha": "left"}
    figure.suptitle(wrap(title, 74), size=12, weight="bold", **left)
    figure.supxlabel(wrap(small, 122), size=8, color=TEXT, **left)
    return figure


def times(ratios: list[float]) -> str:
    """Between "takes" and "the time": `0.27 to 0.35 of`, or `1.29 times`."""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    shown = low if low == high else f"{low} to {high}"
    return f"{shown} of" if float(high) < 1 else f"{shown} times"


def is_ours(name: str) -> bool:
    return "tdjax" in name


def draw_lines(ax: Axes, lines: dict[str, list], peers: tuple[str, ...]) -> None:
    """A line for each name, peers in grey and behind, each named at its end.

    Set the scales of `ax` before: the names are moved until none overlap.
    """
    ends = [max(line) for line in lines.values()]
    for place, (name, line) in enumerate(lines.items()):
        color, style = (PEER, "-") if name in peers else (OURS, "--" if place else "-")
        mark = "os^D"[place % 4]
        ax.plot(*zip(*sorted(line)), style, color=color, marker=mark, zorder=5 - place)
    ax.autoscale_view()
    points = 72 / ax.figure.dpi
    heights = [y * points for _, y in ax.transData.transform(ends)]
    for name, end, move in zip(lines, ends, _moves(heights, 15)):
        color, weight = (TEXT, "normal") if name in peers else (OURS, "bold")
        look: dict[str, Any] = {"color": color, "weight": weight, "va": "center"}
        ax.annotate(name, end, (8, move), textcoords="offset points", **look)


def _moves(heights: list[float], gap: float) -> list[float]:
    """How far to move each, so that all are at least `gap` apart."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for low, high in itertools.pairwise(order):
        moved[high] = max(moved[high], moved[low] + gap)
    shift = (sum(moved) - sum(heights)) / len(moved)
    return [new - old - shift for new, old in zip(moved, heights)]


def _name_rows(ax: Axes, names) -> None:
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.4, -0.6)


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


def _log_scale(axis: XAxis | YAxis) -> None:
    """Ticks that read as numbers, the fewer the more the axis spans."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    few, some, many = [1], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]
    subs = many if high / low < 3.5 else some if high / low < 40 else few
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


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
    _name_rows(axes[0], names or first)
    _log_scale(axes[0].xaxis)
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
    _log_scale(ax.yaxis)
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
    _log_scale(ax.xaxis)


def _tuner(rows: list[Row], about: Row) -> Figure:
    """Every choice as a faint dot, with the default and the tuner's pick."""
    cases: dict[str, list[Row]] = {}
    for row in [*_of("gradient", rows), *_of("forward", rows)]:
        cases.setdefault(f"{row['layer']}, {row['of']}", []).append(row)
    figure, (ax,) = new_figure([" "], 1.9 + 0.4 * len(cases))
    points = {kind: [] for kind in ("others", "default", "pick")}
    for place, found in enumerate(cases.values()):
        best = min(row["seconds"] for row in found)
        for row in found:
            kind = "default" if row is found[0] else "others"
            kind = "pick" if row["chosen"] else kind
            points[kind].append((row["seconds"] / best, place))
    _draw_points(ax, points["others"], "o", "0.7", ms=4, label="other choices")
    _draw_points(ax, points["default"], "s", TEXT, ms=7, label="the default")
    _draw_points(ax, points["pick"], "o", OURS, ms=9, label="the tuner's pick")
    _name_rows(ax, cases)
    ax.set_xlabel("time, the fastest choice = 1")
    _log_scale(ax.xaxis)
    _name_marks(ax)
    lost = [ratio for ratio, _ in points["pick"]]
    near = f"{sum(ratio <= 1.1 for ratio in lost)} of {len(lost)} cases"
    title = f"The tuner's pick is within 1.1 times the fastest choice in {near}"
    return name_figure(figure, f"{title}, at worst {max(lost):.2f} times", about)


def _draw_points(ax: Axes, points: list, mark: str, color: str, **look) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], mark, color=color, **look)


def _name_marks(ax: Axes) -> None:
    """The names of the marks in a line above the panels, where no data is."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    ax.legend(ncols=3, columnspacing=1, handletextpad=0.2, **place).set_in_layout(False)


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
    calls = {row["candidate"]: 1e6 * row["seconds"] for row in rows}
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
            _draw_points(ax, points, *look[label], label=label, **fill)
        ax.grid(axis="y", color="0.92")
        ax.set_xlabel(title)
        _log_scale(ax.xaxis)
    _name_rows(axes[0], places)
    _name_marks(axes[0])
    ratios = [ratios_to("Keras", rows, KERAS, column) for column in titles]
    title = "Keras models with tdjax.keras; Keras' own layer was not run"
    if all("tdjax.keras" in each for each in ratios):
        first, later = (times([geometric_mean(r["tdjax.keras"])]) for r in ratios)
        title = f"With tdjax.keras, the first call takes {first} Keras' time, "
        title += f"later steps {later} it"
    return name_figure(figure, title, about, "No square: Keras was not run there. ")


PICTURES: dict[str, Callable[[list[Row], Row], Figure | None]] = {
    "dense": _beside_peers, "blocks": _beside_peers, "video": _beside_peers,
    "compile": draw_compile_time, "memory": _memory, "tuner": _tuner,
    "packing": _packing, "loss": _loss, "keras": _keras,
    "operations": _operations, "overhead": _overhead,
}  # fmt: skip
