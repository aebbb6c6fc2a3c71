"""Reads CoNLL-U files: words, their universal parts of speech, and ids for words.

The format: https://universaldependencies.org/format.html.
"""

import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UPOS = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM")
UPOS += ("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X")
BUCKETS = 2**14

_WORD = re.compile(r"[1-9][0-9]{,8}")
_RANGE = re.compile(r"([1-9][0-9]{,8})-([1-9][0-9]{,8})")
_EMPTY_NODE = re.compile(r"([0-9]{1,9})\.[1-9][0-9]{,8}")


class MalformedFile(ValueError):
    """Says where a file is wrong, what is there and what should be."""


class Word(NamedTuple):
    form: str
    upos: str


def word_ids(form: str) -> list[int]:
    """Buckets of the word, its shape and its ends; unknown words share some of them.

    Python's `hash` of a string differs from run to run, `crc32` does not.
    """
    low = form.lower()
    parts = [form, low, _shape(form)]
    parts += [low[:n] for n in (1, 2, 3)] + [low[-n:] for n in (1, 2, 3, 4)]
    return [zlib.crc32(f"{i} {x}".encode()) % BUCKETS for i, x in enumerate(parts)]


def _shape(form: str) -> str:
    """`"McDonald-99"` -> `"XxXx-9"`."""
    kinds = ["X" if c.isupper() else "x" if c.isalpha() else c for c in form]
    kinds = ["9" if kind.isdigit() else kind for kind in kinds]
    return "".join(kind for kind, _ in itertools.groupby(kinds))


def read_conllu(path: str | Path) -> list[list[Word]]:
    """The sentences of a file, as syntactic words (ranges and empty nodes are not).

    Raises:
      MalformedFile: if the file is malformed, with the line, what it has and what it
        should have.
    """
    sentences = [words for block in _blocks(path) if (words := _words(block))]
    if not sentences:
        raise MalformedFile(f"{path}: no words, expected at least one sentence")
    return sentences


def _blocks(path: str | Path) -> Iterator[list[tuple[str, str]]]:
    """Lines with their places, from one blank line to the next."""
    for blank, lines in itertools.groupby(_lines(path), lambda line: not line[1]):
        if not blank:
            yield list(lines)


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            yield where, line.decode().rstrip("\r")
        except UnicodeDecodeError:
            raise _malformed(where, f"{line[:40]!r}", "text in UTF-8") from None


def _words(block: list[tuple[str, str]]) -> list[Word]:
    words, last_of_range = [], 0
    for where, line in block:
        if line.startswith("#"):
            continue
        columns = _columns(where, line)
        if _WORD.fullmatch(columns[0]):
            words.append(_word(where, columns, len(words) + 1))
        else:
            last = _last_word_of_node(where, columns[0], len(words))
            last_of_range = max(last_of_range, last)
    if last_of_range > len(words):
        where, found = block[-1][0], f"the end of a sentence of {len(words)} word(s)"
        raise _malformed(where, found, f"word {last_of_range}, the last of a range")
    return words


def _malformed(where: str, found: str, expected: str) -> MalformedFile:
    return MalformedFile(f"{where}: found {found}, expected {expected}")


def _columns(where: str, line: str) -> list[str]:
    columns = line.split("\t")
    if len(columns) != 10:
        found = f"{len(columns)} column(s) in {line[:40]!r}"
        raise _malformed(where, found, "10 columns with tabs between them")
    return columns


def _word(where: str, columns: list[str], expected_id: int) -> Word:
    identifier, form, _, upos = columns[:4]
    if int(identifier) != expected_id:
        raise _malformed(where, f"word ID {identifier}", str(expected_id))
    if not form:
        raise _malformed(where, "an empty FORM", "a word")
    if upos not in UPOS:
        raise _malformed(where, f"UPOS {upos!r}", f"one of {' '.join(UPOS)}")
    return Word(form, upos)


def _last_word_of_node(where: str, identifier: str, words: int) -> int:
    """Where a range ends; 0 for an empty node, which holds no word."""
    if match := _RANGE.fullmatch(identifier):
        first, last = map(int, match.groups())
        if first == words + 1 and first <= last:
            return last
        raise _malformed(where, f"range {identifier}", f"one from word {words + 1} on")
    if match := _EMPTY_NODE.fullmatch(identifier):
        if int(match[1]) == words:
            return 0
        raise _malformed(where, f"empty node {identifier}", f"{words}.1 or the like")
    raise _malformed(where, f"ID {identifier!r}", "a number, a range or an empty node")
