"""Ragged sequences as arrays of one shape, and the order in which batches take them."""

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NO_LABEL = -1


class InputError(ValueError):
    """What the user gave cannot be used; the message says why and what to do."""


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

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this task, as JSON."""
        return {
            "task": self.name,
            "tags": list(self.tags),
            "vocabulary": self.vocabulary,
            "training data": _checksum(self.train),
            "held-out data": _checksum(self.held_out),
        }


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


def _checksum(windows: Windows) -> str:
    return f"{zlib.crc32(b''.join(x.tobytes() for x in windows.arrays)):08x}"


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """The windows of one step: a pure function, so a resumed run needs no iterator.

    Every epoch is a permutation of all `count` windows; a batch may span two epochs.
    """
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), count)
    return np.array([_order(seed, int(e), count)[p] for e, p in zip(epochs, places)])


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def majority_accuracy(task: Task) -> float:
    """Held-out accuracy of always answering the most frequent tag of training."""
    seen = task.train.labels[task.train.labels != NO_LABEL]
    majority = np.bincount(seen).argmax()
    return float((task.held_out.labels == majority).sum() / task.held_out.lengths.sum())
