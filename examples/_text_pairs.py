"""Pairs of texts of different lengths as arrays: characters are their ASCII codes."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

# Follows every text, and fills what comes after it.
END = 0
SYMBOLS = 128


class Pairs(NamedTuple):
    """Texts as `(examples, time)` symbols.

    The first `END` counts to the length of a target, since it is to be predicted.
    """

    sources: Any
    source_lengths: Any
    targets: Any
    target_lengths: Any


def as_pairs(
    texts: Iterable[tuple[str, str]], source_length: int, target_length: int
) -> Pairs:
    sources, targets = zip(*texts)
    return Pairs(
        sources=_symbols(sources, source_length),
        source_lengths=np.array([len(text) for text in sources], np.int32),
        targets=_symbols(targets, target_length),
        target_lengths=np.array([len(text) + 1 for text in targets], np.int32),
    )


def _symbols(texts: Iterable[str], length: int) -> np.ndarray:
    padded = b"".join(text.encode("ascii").ljust(length, b"\0") for text in texts)
    return np.frombuffer(padded, np.uint8).reshape(-1, length).astype(np.int32)


def as_text(symbols: np.ndarray) -> str:
    """The text before the first `END`."""
    return bytes(symbols.tolist()).split(b"\0")[0].decode("ascii")
