"""What the user sees of any example: progress, the table of results, the curve."""

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from _checkpoints import write_atomically

# The first import on a machine builds a font cache and says so.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

Point = dict[str, Any]
STYLES = ("--", ":", "-.")


class TrainingProgress:
    """A bar where there is a terminal, and a line for each point of the curve."""

    def __init__(
        self, console: Console, done: int, total: int, quantities: Mapping[str, str]
    ):
        self._console, self._quantities = console, quantities
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        start = {"completed": done, "status": "compiling"}
        self._bar = self._progress.add_task("", total=total, **start)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        shown = [
            f"{name} {metrics[name]:{form}}"
            for name, form in self._quantities.items()
            if name in metrics
        ]
        status = " ".join([*shown, self._rate()])
        self._progress.update(self._bar, completed=done, status=status)

    def point(self, point: Point) -> None:
        task = self._progress.tasks[0]
        left = (
            "" if task.time_remaining is None else f"{task.time_remaining:.0f} s left"
        )
        shown = [
            f"{name} {point[f'train_{name}']:{form}}"
            f" (held out {point[f'held_out_{name}']:{form}})"
            for name, form in self._quantities.items()
        ]
        self._console.print(
            f"step {point['step']:5}/{task.total:.0f}",
            *(f" {text}" for text in (*shown, self._rate(), left)),
            highlight=False,
            soft_wrap=True,
        )

    def _rate(self) -> str:
        speed = self._progress.tasks[0].speed
        return "" if speed is None else f"{speed:.1f} steps/s"


def results(title: str, rows: Mapping[str, Mapping[str, str]]) -> Table:
    """A table of methods: `{"tagger": {"accuracy": "97.3%"}, ...}`."""
    table = Table(title=title)
    table.add_column("")
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in columns:
        table.add_column(name, justify="right")
    for method, row in rows.items():
        table.add_row(method, *(row.get(name, "") for name in columns))
    return table


def save_figure(path: Path, figure: Figure) -> None:
    """As PNG. Make figures with `new_figure`."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def new_figure(width: float, height: float) -> Figure:
    # Not through pyplot, which looks for a display; a bare figure draws with Agg.
    return Figure(figsize=(width, height), layout="constrained")


def save_curve(
    path: Path,
    curve: list[Point],
    quantities: Mapping[str, str],
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    """A panel for each quantity: both sides against the step, and the baselines."""
    figure = new_figure(4.5 * len(quantities), 3.6)
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, (quantity, form) in zip(panels, quantities.items()):
        _draw(axes, curve, quantity)
        lines = zip(baselines.get(quantity, {}).items(), itertools.cycle(STYLES))
        for (name, value), style in lines:
            axes.axhline(value, color="grey", linestyle=style, label=name)
        if form.endswith("%"):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        else:
            axes.set_ylim(bottom=0)
        axes.legend()
    save_figure(path, figure)


def _draw(axes: Any, curve: list[Point], quantity: str) -> None:
    steps = [point["step"] for point in curve]
    for side, label in (("train", "training"), ("held_out", "held out")):
        values = [point[f"{side}_{quantity}"] for point in curve]
        axes.plot(steps, values, marker=".", label=label)
    axes.set(xlabel="step", ylabel=quantity)
    axes.grid(alpha=0.3)
