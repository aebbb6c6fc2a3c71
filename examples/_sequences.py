"""Ragged sequences as arrays of one shape."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NO_LABEL = -1


class Tagged(NamedTuple):
    """One sequence: `symbols[i]` has the features `ids[i]` and the tag `labels[i]`."""

    source: str
    symbols: Sequence[str]
    ids: np.ndarray
    labels: np.ndarray


class Windows(NamedTuple):
    """Sequences cut and padded to one length; padding has the label `NO_LABEL`.

    `ids` is `(windows, time, features)`, `labels` is `(windows, time)` and `lengths`
    is `(windows,)`.
    """

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    sources: list[str]
    symbols: list[Sequence[str]]

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.ids, self.labels, self.lengths


@dataclass(frozen=True)
class Task:
    """What to tag: `ids` are below `vocabulary`, labels count through `tags`.

    A label of the held-out set is `NO_LABEL` where training never saw its tag.
    """

    name: str
    unit: str
    tags: tuple[str, ...]
    vocabulary: int
    train: Windows
    held_out: Windows
    between_symbols: str = ""
    between_windows: str = ""


def cut(
    train: list[Tagged], held_out: list[Tagged], length: int
) -> tuple[Windows, Windows]:
    """Cuts sequences into windows of at most `length`; nothing is dropped."""
    longest = max(len(sequence.labels) for sequence in (*train, *held_out))
    length = min(length, longest)
    return _windows(train, length), _windows(held_out, length)


def _windows(sequences: list[Tagged], length: int) -> Windows:
    pieces = [piece for sequence in sequences for piece in _pieces(sequence, length)]
    return Windows(
        ids=_pad([piece.ids for piece in pieces], length, 0),
        labels=_pad([piece.labels for piece in pieces], length, NO_LABEL),
        lengths=np.array([len(piece.labels) for piece in pieces], np.int32),
        sources=[piece.source for piece in pieces],
        symbols=[piece.symbols for piece in pieces],
    )


def _pieces(sequence: Tagged, length: int) -> Iterable[Tagged]:
    source, symbols, ids, labels = sequence
    for start in range(0, len(labels), length):
        span = slice(start, start + length)
        yield Tagged(source, symbols[span], ids[span], labels[span])


def _pad(arrays: list[np.ndarray], length: int, value: int) -> np.ndarray:
    padded = np.full((len(arrays), length, *arrays[0].shape[1:]), value, np.int32)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded


def majority_accuracy(task: Task) -> float:
    """Held-out accuracy of always answering the most frequent tag of training."""
    seen = task.train.labels[task.train.labels != NO_LABEL]
    majority = np.bincount(seen).argmax()
    return float((task.held_out.labels == majority).sum() / task.held_out.lengths.sum())
