"""Checkpoints from which a stopped run goes on, and files that are never half there."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp

from _options import InputError

try:
    import fcntl
except ImportError:  # Windows has none; there, nothing guards a folder.
    fcntl = None

# The file in a run's folder that a process holds while it is at work there.
LOCK = ".lock"

# Orbax reports its own workings as warnings; what fails still raises.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints in a folder: arrays, and beside them a record in JSON.

    The record has a checksum of each: Orbax restores a flipped byte as it is.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        if step == self.latest:
            return
        record = {**record, "checksum of the arrays": checksum(state)}
        sealed = {**record, "checksum": checksum_of_record(record)}
        parts = {
            "state": ocp.args.StandardSave(state),
            "record": ocp.args.JsonSave(sealed),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**parts))
        except Exception as error:
            if "No space left" not in str(error):
                raise
            raise InputError(
                f"no space left on the disk for {self.folder / str(step)}: make some, "
                "and go on with --resume"
            ) from error

    def restore(
        self, like: Any, check: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], Any, list[str]]:
        """`(record, state, damages)` of the newest checkpoint that is sound.

        `check(record)` refuses a run that is another one. Newer checkpoints, which are
        damaged, are deleted; `damages` says so.
        """
        damages: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = self._load(step, record=ocp.args.JsonRestore())
                if record.pop("checksum") != checksum_of_record(record):
                    raise ValueError("its record is not the one that was saved")
                check(record)
                state = self._load(step, state=ocp.args.StandardRestore(like))
                if record["checksum of the arrays"] != checksum(state):
                    raise ValueError("its numbers are not those that were saved")
            except InputError:
                raise
            except Exception as error:
                # A damaged file may make Orbax and its parts raise anything.
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                damages[step] = f"{self.folder / str(step)} is damaged: {reason:.100}"
                continue
            for damaged in damages:
                self._manager.delete(damaged)
            return record, state, list(damages.values())
        raise InputError(
            f"{'; '.join(damages.values())}. No other checkpoint is kept: start again, "
            "with another --out"
        )

    def _load(self, step: int, **args: Any) -> Any:
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        (name,) = args
        return restored[name]

    def path(self) -> Path:
        return self.folder / str(self.latest)


def refuse_existing(folder: Path):
    raise InputError(
        f"{folder} holds a run already: go on with it with --resume, or give another "
        "folder with --out"
    )


def refuse_differences(folder: Path, saved: dict[str, Any], now: dict[str, Any]):
    """Raises if a saved run and this one would not be the same run."""
    names = [name for name in {**now, **saved} if saved.get(name) != now.get(name)]
    if names:
        differences = "; ".join(
            f"{name} is {now.get(name)!r}, was {saved.get(name)!r}" for name in names
        )
        raise InputError(f"cannot resume {folder} with other settings: {differences}")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if it is missing.

    The system gives it free when the process ends, in whatever way.
    """
    is_new = not folder.exists()
    handle = _lock(folder)
    try:
        yield
    finally:
        # Where nothing came of the run, nothing stays.
        with contextlib.suppress(OSError):
            if is_new and [*folder.iterdir()] == [folder / LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(handle)


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may remove the file, before or after it is opened here.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
            if _is_locked(folder, handle):
                return handle
            os.close(handle)


def _is_locked(folder: Path, handle: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"another process is at work in {folder}: wait for its end, or give "
            "another folder with --out"
        ) from error
    except OSError:
        return True  # A file system without locks.
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Readers see the old file or the whole new one, whenever the run is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(tree: Any) -> str:
    """Equal for two trees of arrays if and only if every bit of them is."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        )
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def checksum_of_record(record: dict[str, Any]) -> str:
    return checksum_of_bytes(json.dumps(record, sort_keys=True).encode())


def checksum_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
