"""A folder of measurements, one file per entry, shared by any number of processes.

An entry is a `Tuning` as JSON. Its file is named by a hash of what was measured and
where. A file is replaced as a whole or not at all, so nobody needs a lock.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdjax._checks import warn
from tdjax._tuning.result import Tuning

LARGEST_ENTRY = 2**28  # bytes


def load(folder: Path, about: dict[str, Any]) -> Tuning | None:
    """The result stored for the same `about`, or None."""
    path = _entry(folder, about)
    try:
        tuning = Tuning.from_json(read_text(path))
        options = [candidate.options for candidate in tuning.candidates]
        listed = about.get("candidates", options)
        if tuning.about != about or options[: len(listed)] != listed:
            raise ValueError("it holds other measurements")
        return tuning
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"The cache entry {str(path)!r} is ignored: {reason_of(error)}.")
        return None


def reason_of(error: Exception) -> str:
    """Why a file can't be used; what a text must be is for those who have given one."""
    if not isinstance(error, ValueError):
        return str(error)
    cause = error.__cause__
    why = f"{type(cause).__name__}: {cause}" if cause else str(error)
    return f"it is damaged, or of another version ({why})"


def store(folder: Path, tuning: Tuning) -> None:
    """Writes an entry, or warns if the folder can't be written to."""
    path = _entry(folder, tuning.about)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, tuning.to_json())
    except OSError as error:
        warn(f"The cache entry {str(path)!r} can't be written: {error}.")


def _entry(folder: Path, about: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return folder / f"{key}.json"


def read_text(path: Path) -> str:
    """The text of a regular file that is not too large."""
    # A pipe would block, and a device such as /dev/zero has no end.
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")
    if path.stat().st_size > LARGEST_ENTRY:
        raise OSError(f"it is larger than {LARGEST_ENTRY} bytes")
    return path.read_text(encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    unique = f"{os.getpid()}-{threading.get_ident()}"
    draft = path.with_suffix(f".{unique}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other threads and processes from changing a file there, where it can."""
    try:
        import fcntl
    except ImportError:  # Windows: the last writer wins.
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network drives have no locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # It unlocks too.
