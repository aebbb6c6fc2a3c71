"""Held-out windows of a tagging task in the colours of their predicted tags."""

import numpy as np
from rich.panel import Panel
from rich.text import Text

from _sequences import NO_LABEL, Task

COLOURS = ("bright_black", "magenta", "cyan", "yellow", "green", "blue", "red")
COLOURS += ("bright_cyan", "bright_yellow", "bright_magenta", "bright_green", "tan")
COLOURS += ("bright_blue", "bright_red", "orange3", "medium_purple3", "white")
MISTAKE = "bold underline"
SHOWN = 4


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
