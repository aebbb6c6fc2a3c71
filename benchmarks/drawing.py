"""What the pictures of all suites share: figures, lines, scales and words.

The style is `src/tdjax/plots.mplstyle`: tdjax in the one strong colour, peers in greys.
"""

import itertools
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

Row = dict[str, Any]
OURS, TEXT, PEER = "C0", "C1", "C2"


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
    for name, end, move in zip(lines, ends, moves(heights, 15)):
        color, weight = (TEXT, "normal") if name in peers else (OURS, "bold")
        look: dict[str, Any] = {"color": color, "weight": weight, "va": "center"}
        ax.annotate(name, end, (8, move), textcoords="offset points", **look)


def moves(heights: list[float], gap: float) -> list[float]:
    """How far to move each, so that all are at least `gap` apart."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for low, high in itertools.pairwise(order):
        moved[high] = max(moved[high], moved[low] + gap)
    shift = (sum(moved) - sum(heights)) / len(moved)
    return [new - old - shift for new, old in zip(moved, heights)]


def name_rows(ax: Axes, names) -> None:
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.4, -0.6)


def log_scale(axis: XAxis | YAxis) -> None:
    """Ticks that read as numbers, the fewer the more the axis spans."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    few, some, many = [1], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]
    subs = many if high / low < 3.5 else some if high / low < 40 else few
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def draw_points(ax: Axes, points: list, mark: str, color: str, **look) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], mark, color=color, **look)


def name_marks(ax: Axes) -> None:
    """The names of the marks in a line above the panels, where no data is."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    ax.legend(ncols=3, columnspacing=1, handletextpad=0.2, **place).set_in_layout(False)
