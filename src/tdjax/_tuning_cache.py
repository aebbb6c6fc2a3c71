"""A file of measurements that any number of processes may share."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tdjax._candidates import OPTIONS, Candidate, make_options

try:
    import fcntl
except ImportError:  # Windows: the last of two writers wins, and no file is damaged.
    fcntl = None

_FORMAT = "tdjax tuning cache, format 1"


def load(path: Path, about: dict[str, Any]) -> list[Candidate] | None:
    """The candidates measured before for the same `about`, or None."""
    entry = _read(path).get(_key(about))
    if entry is None:
        return None
    try:
        return _candidates(entry, about)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        _warn(path, f"an entry in it is damaged ({type(error).__name__}: {error})")
        return None


def store(path: Path, about: dict[str, Any], candidates: list[Candidate]) -> None:
    """Adds an entry; the file is replaced as a whole or not at all."""
    fields = [dataclasses.asdict(each) for each in candidates]
    entry = {"about": about, "candidates": fields}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            entries = {**_read(path, quiet=True), _key(about): entry}
            text = json.dumps({"format": _FORMAT, "entries": entries}, indent=1)
            _write_atomically(path, text)
    except OSError as error:
        _warn(path, f"it can't be written ({type(error).__name__}: {error})")


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read(path: Path, quiet: bool = False) -> dict[str, Any]:
    """The entries of the file; a file that has none is warned of, unless `quiet`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"it is not a {_FORMAT}")
        return dict(content["entries"])
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        if not quiet:
            _warn(path, f"it can't be read ({type(error).__name__}: {error})")
        return {}


def _warn(path: Path, why: str) -> None:
    message = f"cache={str(path)!r} is ignored: {why}."
    warnings.warn(message, UserWarning, stacklevel=2)


def _candidates(entry: dict[str, Any], about: dict[str, Any]) -> list[Candidate]:
    """Checked field by field: the file may come from anywhere."""
    if entry["about"] != about:
        raise ValueError("it belongs to other measurements")
    candidates = [_candidate(fields) for fields in entry["candidates"]]
    if not any(each.measured for each in candidates):
        raise ValueError("nothing was measured")
    return candidates


def _candidate(fields: dict[str, Any]) -> Candidate:
    if set(fields["options"]) != set(OPTIONS):
        raise ValueError(f"options {fields['options']}")
    spread = fields["spread"]
    candidate = Candidate(
        make_options(**fields["options"]),
        _number(int, fields["blocks"]),
        str(fields["verdict"]),
        _number(float, fields["compile_seconds"]),
        _number(float, fields["run_seconds"]),
        spread and (_number(float, spread[0]), _number(float, spread[1])),
        _number(int, fields["temporary_bytes"]),
        _number(float, fields["deviation"]),
    )
    if candidate.measured and candidate.run_seconds is None:
        raise ValueError("measured, without a time")
    return candidate


def _number(kind: type, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{value!r} is not a number that can be")
    return kind(value)


@contextlib.contextmanager
def _locked(path: Path):
    """Between reading and replacing, nobody else may do the same."""
    if fcntl is None:
        yield
        return
    with open(path.with_name(path.name + ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_atomically(path: Path, text: str) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
