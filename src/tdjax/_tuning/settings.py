"""The arguments of `autotune` that say how to search, and their checks."""

import dataclasses
import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tdjax._checks import describe
from tdjax._steps.lowering import AUTO, METHODS
from tdjax._tuning.candidates import OPTIONS, check_compiler_options
from tdjax._tuning.deviations import is_float


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields are arguments of `tdjax.autotune`."""

    argnums: int | Sequence[int] | None
    budget: int | float
    memory_limit: int | None
    tolerance: int | float | None
    candidates: Sequence[Mapping[str, Any]] | None
    cache: str | os.PathLike[str] | None
    compiler_options: Sequence[Mapping[str, Any]] = ()
    # Set by Ctrl-C: of a whole model, nothing more is tuned.
    interrupted: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __post_init__(self):
        for name in ("budget", "memory_limit", "tolerance"):
            value = getattr(self, name)
            if value is not None or name == "budget":
                _require_positive(name, value)
        self.folder()
        options = self.compiler_options
        if not isinstance(options, Sequence) or isinstance(options, str):
            raise TypeError(
                "compiler_options must be a list of mappings, each of them tried by "
                f"itself, got {describe(options)}. Write [{{...}}]."
            )
        checked = [*map(check_compiler_options, options)]
        object.__setattr__(self, "compiler_options", checked)

    def folder(self) -> Path | None:
        """The folder of the cache."""
        if self.cache is None:
            return None
        is_path = isinstance(self.cache, str | os.PathLike)
        path = os.fsdecode(self.cache) if is_path else ""
        if not path or "\0" in path:
            raise TypeError(f"cache must be the path of a folder, got {self.cache!r}.")
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError(
                f"cache must be a folder, with a file for each result, got {path!r}, "
                "which is not one. Give another path; the folder need not exist."
            )
        return Path(path)

    def positions(self, args: tuple) -> list[int]:
        """The arguments to differentiate by, counted from the front."""
        if self.argnums is None:
            return []
        argnums = self.argnums if isinstance(self.argnums, Sequence) else [self.argnums]
        if not argnums:
            raise ValueError("argnums must name an argument; None is for no gradient.")
        for i in argnums:
            is_int = isinstance(i, int) and not isinstance(i, bool)
            if is_int and -len(args) <= i < len(args):
                continue
            raise (ValueError if is_int else TypeError)(
                f"argnums must be positions of the {len(args)} argument(s), such as 0, "
                f"got {self.argnums!r}."
            )
        positions = sorted({i % len(args) for i in argnums})
        for i in positions:
            if not any(map(is_float, jax.tree.leaves(args[i]))):
                raise ValueError(
                    f"argnums={self.argnums!r} must point at floating point arguments, "
                    f"got {describe(args[i])} at {i}."
                )
        return positions


def refuse_lowering(call: Callable, kwargs: Mapping[str, Any]) -> None:
    """Refuses keyword arguments that name a lowering and that `call` does not take."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # Of what is no Python function.
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in OPTIONS:
        # Flax has a `method` too, of another kind.
        is_given = kwargs.get(name) in (*METHODS, AUTO) or name != "method"
        if name in kwargs and is_given and name not in parameters and not takes_any:
            raise TypeError(
                f"{name} is what autotune chooses, got {name}={kwargs[name]!r}. Leave "
                f"it out, or give the lowerings to try: candidates=[{{...}}]."
            )


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {describe(value)}.")
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be finite, got infinity or what no float holds.")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
