"""The picture of digits that are told row by row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import SubFigure
from matplotlib.ticker import PercentFormatter

from _digits import CLASSES, ROWS
from _display import new_figure, save_figure

SHOWN_AFTER = (3, 5, 7)


def save_picture(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    answers: np.ndarray,
    accuracies: Mapping[str, np.ndarray],
) -> None:
    """Some digits with the answer after each row; below, how often it is right."""
    figure = new_figure(10, 8)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    above, below = parts
    right = answers == labels[:, None]
    shown = [np.flatnonzero(settled(right) == row)[0] for row in _present(right)]
    _draw_digits(above, images[shown], answers[shown], right[shown])
    curves, by_digit = below.subplots(1, 2)
    _draw_curves(curves, accuracies)
    _draw_by_digit(by_digit, labels, right)
    save_figure(path, figure)


def settled(right: np.ndarray) -> np.ndarray:
    """From which row on, counted from 1, all answers are right; `ROWS + 1` for never.

    `right` is `(n, rows)`.
    """
    right_from_here = np.logical_and.accumulate(right[:, ::-1], axis=1)
    return ROWS + 1 - right_from_here.sum(1)


def _present(right: np.ndarray) -> list[int]:
    """Rows after which some digit is settled, those to show if there are."""
    rows = sorted({*settled(right).tolist()})
    return [row for row in SHOWN_AFTER if row in rows] or rows[:1]


def _draw_digits(figure: SubFigure, images, answers, right) -> None:
    panels = figure.subplots(len(images), ROWS, squeeze=False)
    figure.suptitle("the many-to-many answer after each row")
    for row, panels_of_digit in enumerate(panels):
        for after, axes in enumerate(panels_of_digit):
            seen = np.where(np.arange(ROWS)[:, None] <= after, images[row], np.nan)
            axes.set_facecolor("lavender")
            axes.imshow(seen, cmap="Greys", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            colour = "tab:green" if right[row, after] else "tab:red"
            axes.set_title(str(answers[row, after]), color=colour, fontweight="bold")


def _draw_curves(axes, accuracies: Mapping[str, np.ndarray]) -> None:
    rows = np.arange(1, ROWS + 1)
    for name, values in accuracies.items():
        style = "--" if "baseline" in name else "-"
        axes.plot(rows, values, style, marker=".", label=name)
    axes.set(xlabel="rows seen", ylabel="held-out accuracy", xticks=rows, ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    axes.legend(**above, ncols=2, fontsize=8, frameon=False)


def _draw_by_digit(axes, labels, right) -> None:
    shares = [right[labels == digit].mean(0) for digit in range(CLASSES)]
    axes.imshow(shares, vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="rows seen", ylabel="digit", title="many-to-many, by digit")
    axes.set(xticks=np.arange(ROWS), xticklabels=np.arange(1, ROWS + 1))
    axes.set(yticks=np.arange(CLASSES))
    for digit, values in enumerate(shares):
        for row, share in enumerate(values):
            colour = "white" if share < 0.6 else "black"
            axes.text(
                row,
                digit,
                f"{share:.0%}",
                color=colour,
                fontsize=7,
                ha="center",
                va="center",
            )
