"""Checkpoints from which a stopped run goes on, and files that are never half there."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp

from _options import InputError

# Orbax reports its own workings as warnings; what fails still raises.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints in a folder: arrays, and beside them a record in JSON."""

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
        if step != self.latest:
            arrays, json = ocp.args.StandardSave(state), ocp.args.JsonSave(record)
            self._manager.save(step, args=ocp.args.Composite(state=arrays, record=json))

    def record(self) -> dict[str, Any]:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(self.latest, args=args)["record"]

    def state(self, like: Any) -> Any:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(self.latest, args=args)["state"]

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
