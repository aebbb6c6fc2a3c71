"""Python functions as documents: lines of words, and how the indentation changes."""

import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from _python_source import read_sources
from _sequences import NO_LABEL

STEPS = ("in", "same", "out", "out 2", "out 3")
FILES = 400
LINES, WORDS = 32, 16
SHORTEST = 4
VOCABULARY = 1000
LAST_WORDS = 6

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}


class Line(NamedTuple):
    """A logical line: without comments, and whole where it goes over several."""

    words: list[str]
    depth: int
    text: str


class Documents(NamedTuple):
    """Functions, padded in lines and words.

    `words` is `(functions, LINES, WORDS)`, ids below `VOCABULARY`; `word_counts` and
    `labels` are `(functions, LINES)`; `line_counts` is `(functions,)`. A label is the
    index in `STEPS`; the first line and padding have none, `NO_LABEL`.
    """

    words: np.ndarray
    word_counts: np.ndarray
    line_counts: np.ndarray
    labels: np.ndarray


class Corpus(NamedTuple):
    """Two sides of files, and the held-out functions as lines."""

    train: Documents
    held_out: Documents
    held_out_lines: list[list[Line]]


def python_functions() -> Corpus:
    """The functions of Python's standard library; a file is on one side only."""
    train, held_out = (
        [lines for source in side.values() for lines in functions(source)]
        for side in read_sources(FILES)
    )
    ids = vocabulary(train)
    return Corpus(documents(train, ids), documents(held_out, ids), held_out)


def functions(source: str) -> Iterator[list[Line]]:
    """The first lines of each function that is not short, with those inside of it."""
    lines = logical_lines(source)
    end = 0
    for start, line in enumerate(lines):
        if start < end or "def" not in line.words[:2]:
            continue
        outside = (
            i for i in range(start + 1, len(lines)) if lines[i].depth <= line.depth
        )
        end = next(outside, len(lines))
        if end - start >= SHORTEST:
            yield lines[start:end][:LINES]


def logical_lines(source: str) -> list[Line]:
    lines, words, text, depth = [], [], "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            lines.append(Line(words, depth, text))
            words = []
        elif token.type not in _LAYOUT:
            text = text if words else token.line.strip().split("\n")[0]
            words.append(_word(token))
    return lines


def _word(token: tokenize.TokenInfo) -> str:
    # From Python 3.12 on also FSTRING_START, FSTRING_MIDDLE and FSTRING_END.
    if "STRING" in tokenize.tok_name[token.type]:
        return "<string>"
    return "<number>" if token.type == tokenize.NUMBER else token.string


def vocabulary(functions: list[list[Line]]) -> dict[str, int]:
    """Ids of the most frequent words; all others have the id 0."""
    counts = Counter(
        word for lines in functions for line in lines for word in line.words
    )
    # Words as frequent as each other come in the same order on every machine.
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate(words[: VOCABULARY - 1], start=1)}


def documents(functions: list[list[Line]], ids: dict[str, int]) -> Documents:
    words = np.zeros((len(functions), LINES, WORDS), np.int32)
    counts = np.zeros((len(functions), LINES), np.int32)
    labels = np.full((len(functions), LINES), NO_LABEL, np.int32)
    for row, lines in enumerate(functions):
        for column, line in enumerate(lines):
            known = [ids.get(word, 0) for word in _shortened(line.words)]
            words[row, column, : len(known)] = known
            counts[row, column] = len(known)
        labels[row, 1 : len(lines)] = steps([line.depth for line in lines])
    return Documents(words, counts, np.array([*map(len, functions)], np.int32), labels)


def _shortened(words: list[str]) -> list[str]:
    """At most `WORDS`, from the start and from the end, where the colon is."""
    if len(words) <= WORDS:
        return words
    return words[: WORDS - LAST_WORDS] + words[-LAST_WORDS:]


def steps(depths: list[int]) -> np.ndarray:
    """The index in `STEPS` of every change of depth; the last is for three and more."""
    return np.minimum(1 - np.diff(depths), len(STEPS) - 1)


def indent(steps: np.ndarray) -> np.ndarray:
    """The depths of lines after such steps, the first line's included; at least 0."""
    depths = [0]
    for step in steps:
        depths.append(max(depths[-1] + 1 - int(step), 0))
    return np.array(depths)
