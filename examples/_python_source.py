"""A corpus on every machine: the standard library, each character with its tag."""

import io
import keyword
import sysconfig
import tokenize
import zlib
from pathlib import Path

import numpy as np

TAGS = ("other", "keyword", "name", "number", "string", "comment", "operator")
VOCABULARY = 129  # ASCII, and one id for every other character

# Installed packages and tests are not the library; `encodings` is a hundred copies of
# one table, which would be on both sides of the split; `pydoc_data` is one string.
EXCLUDED = {"site-packages", "dist-packages", "test", "idlelib"}
EXCLUDED |= {"encodings", "pydoc_data"}
FILES = 180
LARGEST_FILE = 60_000
HELD_OUT_OF = 12

_TAG_OF_TYPE = {
    tokenize.NAME: "name",
    tokenize.NUMBER: "number",
    tokenize.COMMENT: "comment",
    tokenize.OP: "operator",
    # STRING, and since Python 3.12 FSTRING_START, FSTRING_MIDDLE and FSTRING_END.
    **{kind: "string" for kind, name in tokenize.tok_name.items() if "STRING" in name},
}


def read_sources(files: int = FILES) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out sources by name; a hash of the name decides on the side.

    Files that are empty, or that this Python cannot read, are left out.

    Raises:
      FileNotFoundError: if this Python has no sources of its library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    sides = {}, {}
    for name in _selection(library, files):
        if source := _read(library / name):
            sides[_hash(name) % HELD_OUT_OF == 0][name] = source
    if not all(sides):
        raise FileNotFoundError(f"no Python source in {library}")
    return sides


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def _selection(library: Path, files: int) -> list[str]:
    """The same files on every machine with this Python: the first by hash of name."""
    names = [
        path.relative_to(library).as_posix()
        for pattern in ("*.py", "*/*.py")
        for path in library.glob(pattern)
        if path.relative_to(library).parts[0] not in EXCLUDED
        and path.stat().st_size <= LARGEST_FILE
    ]
    # The bare hash already decides on the side of the split.
    return sorted(names, key=lambda name: _hash("order of " + name))[:files]


def _read(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:
            source = file.read()
        list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, UnicodeError, tokenize.TokenError):
        return None
    return source


def character_ids(source: str) -> np.ndarray:
    """`(characters,)`: the ASCII code, and one id for every other character."""
    codes = np.frombuffer(source.encode("utf-32-le"), np.uint32)
    return np.minimum(codes, VOCABULARY - 1).astype(np.int32)


def label_characters(source: str) -> np.ndarray:
    """`(characters,)`: the index in `TAGS` of the token that each character is in."""
    line_starts = np.cumsum([0, *(len(line) + 1 for line in source.split("\n"))])
    labels = np.full(len(source), TAGS.index("other"), np.int32)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tag := _tag(token):
            (row, column), (end_row, end_column) = token.start, token.end
            start = line_starts[row - 1] + column
            end = line_starts[end_row - 1] + end_column
            end += _is_doubled_brace(token, source[end : end + 1])
            labels[start:end] = TAGS.index(tag)
    return labels


def _tag(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return "keyword"
    return _TAG_OF_TYPE.get(token.type)


def _is_doubled_brace(token: tokenize.TokenInfo, following: str) -> bool:
    """Whether `{{` of an f-string goes on: its token ends before the second brace."""
    in_text = tokenize.tok_name[token.type].endswith("STRING_MIDDLE")
    return in_text and following in ("{", "}") and token.string.endswith(following)
