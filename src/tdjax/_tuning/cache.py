"""A file of measurements that any number of processes may share."""

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from tdjax._tuning.candidates import OPTIONS, Candidate, make_options

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
    entry = {"about": about, "candidates": [each.as_json() for each in candidates]}
    path = path.resolve()  # the file that a link leads to
    try:
        if path.exists() and not path.is_file():
            raise OSError("there is something that is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            entries = {**_read(path, quiet=True), _key(about): entry}
            content = {"format": _FORMAT, "entries": entries}
            _write_atomically(path, json.dumps(content, indent=1, allow_nan=False))
    except OSError as error:
        _warn(path, f"it can't be written ({type(error).__name__}: {error})")


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read(path: Path, quiet: bool = False) -> dict[str, Any]:
    """The entries of the file; a file that has none is warned of, unless `quiet`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
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
    warnings.warn(message, UserWarning, stacklevel=5)


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
    # Under the lock, no other thread or process writes a draft of this name.
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
