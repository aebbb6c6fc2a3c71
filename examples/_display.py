"""What the user sees: progress, the table of results, tags in colour, the curve."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from _checkpoints import write_atomically
from _sequences import NO_LABEL, Task

# The first import on a machine builds a font cache and says so.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

Point = dict[str, Any]

COLOURS = ("bright_black", "magenta", "cyan", "yellow", "green", "blue", "red")
COLOURS += ("bright_cyan", "bright_yellow", "bright_magenta", "bright_green", "tan")
COLOURS += ("bright_blue", "bright_red", "orange3", "medium_purple3", "white")
MISTAKE = "bold underline"
SHOWN = 4


class TrainingProgress:
    """A bar where there is a terminal, and a line for each point of the curve."""

    def __init__(self, console: Console, done: int, total: int):
        self._console = console
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

    def step(self, done: int, loss: float, accuracy: float) -> None:
        status = f"loss {loss:.3f} accuracy {accuracy:.1%} {self._rate()}"
        self._progress.update(self._bar, completed=done, status=status)

    def point(self, point: Point) -> None:
        task = self._progress.tasks[0]
        left = (
            "" if task.time_remaining is None else f"{task.time_remaining:.0f} s left"
        )
        self._console.print(
            f"step {point['step']:5}/{task.total:.0f}"
            f"  loss {point['train_loss']:.3f} (held out {point['held_out_loss']:.3f})"
            f"  accuracy {point['train_accuracy']:.1%}"
            f" (held out {point['held_out_accuracy']:.1%})  {self._rate()}  {left}",
            highlight=False,
            soft_wrap=True,
        )

    def _rate(self) -> str:
        speed = self._progress.tasks[0].speed
        return "" if speed is None else f"{speed:.1f} steps/s"


def results(task: Task, accuracy: float, baseline: float) -> Table:
    table = Table(title=f"{task.name}: held out, {_count(task)}")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("wrong", justify="right")
    for name, value in (("tagger", accuracy), ("majority-class baseline", baseline)):
        wrong = round((1 - value) * task.held_out.lengths.sum())
        table.add_row(name, f"{value:.2%}", f"{wrong:,}")
    return table


def _count(task: Task) -> str:
    return f"{task.held_out.lengths.sum():,} {task.unit}s"


def snippet(task: Task, predicted: np.ndarray) -> Panel:
    """Held-out windows in the colours of their predicted tags, with a legend."""
    shown = _most_varied(task)
    text = Text(task.between_windows).join(
        _coloured(task, index, predicted[index]) for index in shown
    )
    wrong = sum(int(_mistakes(task, index, predicted[index]).sum()) for index in shown)
    total = task.held_out.lengths[shown].sum()
    text.append("\n\n").append_text(_legend(task)).append("\n")
    text.append(f"{wrong} of {total} {task.unit}s wrong", MISTAKE)
    return Panel(text, title=f"tags predicted for {task.held_out.sources[shown[0]]}")


def _most_varied(task: Task) -> list[int]:
    """Neighbours with the most different tags, however well they are predicted."""
    sources, labels = task.held_out.sources, task.held_out.labels
    places = [_neighbours(sources, first) for first in range(len(sources))]
    return max(places, key=lambda rows: len({*labels[rows].flat} - {NO_LABEL}))


def _neighbours(sources: list[str], first: int) -> list[int]:
    following = range(first, min(first + SHOWN, len(sources)))
    return [index for index in following if sources[index] == sources[first]]


def _coloured(task: Task, index: int, predicted: np.ndarray) -> Text:
    mistakes = _mistakes(task, index, predicted)
    return Text(task.between_symbols).join(
        Text(symbol, f"{MISTAKE if wrong else ''} {_colour(tag)}")
        for symbol, tag, wrong in zip(task.held_out.symbols[index], predicted, mistakes)
    )


def _mistakes(task: Task, index: int, predicted: np.ndarray) -> np.ndarray:
    length = task.held_out.lengths[index]
    return predicted[:length] != task.held_out.labels[index, :length]


def _colour(tag: int) -> str:
    return COLOURS[tag % len(COLOURS)]


def _legend(task: Task) -> Text:
    return Text(" ").join(Text(tag, _colour(i)) for i, tag in enumerate(task.tags))


def save_curve(path: Path, curve: list[Point], baseline: float) -> None:
    # Not through pyplot, which looks for a display; a bare figure draws with Agg.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        _draw(axes, curve, quantity)
    accuracy.axhline(baseline, color="grey", linestyle="--", label="majority class")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    loss.set_ylim(bottom=0)
    accuracy.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw(axes: Any, curve: list[Point], quantity: str) -> None:
    steps = [point["step"] for point in curve]
    for side, label in (("train", "training"), ("held_out", "held out")):
        values = [point[f"{side}_{quantity}"] for point in curve]
        axes.plot(steps, values, marker=".", label=label)
    axes.set(xlabel="step", ylabel=quantity)
    axes.grid(alpha=0.3)
    axes.legend()
