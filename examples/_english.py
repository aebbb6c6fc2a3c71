"""English on every machine: the language reference that Python's `help` shows."""

import re
import zlib

import numpy as np

from _options import InputError

# Characters are their ASCII codes.
SYMBOLS = 128
HELD_OUT_OF = 12

_BETWEEN_PARAGRAPHS = re.compile(r"\n\s*\n")
_QUOTES = "\u2018\u2019\u201c\u201d"
_DASHES = "\u2013\u2014"
_ASCII = str.maketrans(_QUOTES + _DASHES, "''\"\"--")
_ASCII |= {ord("\u2026"): "..."}


def english_split() -> tuple[str, str]:
    """A training text and a held-out one, of different chapters, in ASCII."""
    chapters = _without_repetition(_chapters())
    total, held_out = sum(map(len, chapters.values())), set()
    # Python's `hash` of a string differs from run to run, `crc32` does not.
    for name in sorted(chapters, key=lambda name: zlib.crc32(name.encode())):
        if sum(len(chapters[name]) for name in held_out) * HELD_OUT_OF < total:
            held_out.add(name)
    sides = [[], []]
    for name, text in chapters.items():
        sides[name in held_out].append(text)
    train, other = ("\n\n".join(texts) for texts in sides)
    return train, other


def _chapters() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(f"this Python comes without its reference: {error}") from None
    return {name: to_ascii(topics[name]) for name in sorted(topics)}


def to_ascii(text: str) -> str:
    """With plain quotes and dashes, and `?` for what has no ASCII form."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def _without_repetition(chapters: dict[str, str]) -> dict[str, str]:
    """Each paragraph where it is first: some are in several chapters."""
    seen, kept = set(), {}
    for name, text in chapters.items():
        paragraphs = []
        for paragraph in _BETWEEN_PARAGRAPHS.split(text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                paragraphs.append(paragraph)
            seen.add(words)
        kept[name] = "\n\n".join(paragraphs)
    return {name: text for name, text in kept.items() if text}


def to_symbols(text: str) -> np.ndarray:
    """`(characters,)`."""
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)


def to_text(symbols: np.ndarray) -> str:
    return bytes(symbols.tolist()).decode("ascii")


def windows(text: str, length: int) -> np.ndarray:
    """`(windows, length + 1)`: each begins with the character that the last ends with.

    So of each window `length` characters are to be predicted, and each character of
    the text but the first once. What is too short for a window at the end is left out.
    """
    symbols = to_symbols(text)
    if len(symbols) <= length:
        raise InputError(f"a text of {len(symbols)} has no window of {length}")
    starts = np.arange(0, len(symbols) - length, length)
    return symbols[starts[:, None] + np.arange(length + 1)]
