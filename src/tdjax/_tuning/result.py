"""What `autotune` returns."""

import dataclasses
import json
from typing import Any, Generic, TypeVar, cast

from tdjax._tuning.candidates import Candidate
from tdjax._tuning.report import rich_table
from tdjax._tuning.search import choose

T = TypeVar("T")


@dataclasses.dataclass
class Tuning(Generic[T]):
    """The result of `autotune`.

    Attributes:
      tuned: the function or module with the chosen options; None if the result was
        loaded by `from_json`.
      candidates: every lowering that was considered, with its `options`, `verdict`,
        `run_seconds`, `spread`, `compile_seconds`, `temporary_bytes` and `deviation`.
      about: what was measured and where: device, versions, shapes, arguments.
      from_cache: whether the measurements were read from the cache, not made.
      best: the candidate that was chosen.
      options: its `method`, `chunk_size`, `unroll` and `remat`, as a dict of keyword
        arguments for `time_distributed` or a `TimeDistributed`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> result = tdjax.autotune(jnp.sin, jnp.ones((2, 4, 3)), budget=1)
      >>> saved = result.to_json()
      >>> options = tdjax.Tuning.from_json(saved).options
      >>> sorted(options)
      ['chunk_size', 'method', 'remat', 'unroll']
      >>> tuned = tdjax.time_distributed(jnp.sin, **options)
    """

    tuned: T
    candidates: list[Candidate]
    about: dict[str, Any]
    from_cache: bool = False

    @property
    def best(self) -> Candidate:
        """The candidate that was chosen."""
        return choose(self.candidates)

    @property
    def options(self) -> dict[str, Any]:
        """The chosen `method`, `chunk_size`, `unroll` and `remat`."""
        return self.best.options

    def show(self) -> None:
        """Prints a table of all candidates."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self):
        what = "forward" if self.about["argnums"] == [] else "forward and gradient"
        title = f"{what} on {self.about['device']}, JAX {self.about['jax']}"
        return rich_table(self.candidates, self.best, title)

    def __repr__(self):
        timed = sum(c.run_seconds is not None for c in self.candidates)
        return f"Tuning({self.best}; {timed} of {len(self.candidates)} measured)"

    def to_json(self) -> str:
        """Everything but `tuned`, as JSON; an infinite deviation is null."""
        fields = {
            "options": self.options,
            "from_cache": self.from_cache,
            "about": self.about,
            "candidates": [candidate.as_json() for candidate in self.candidates],
        }
        return json.dumps(fields, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Tuning[Any]":
        """Reads what `to_json` wrote; `tuned` is None.

        Raises:
          ValueError: if `text` is not what `to_json` writes.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
            candidates = [Candidate.from_json(c) for c in content["candidates"]]
            about, from_cache = dict(content["about"]), bool(content["from_cache"])
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"text must be what Tuning.to_json writes, got {str(text)[:80]!r} "
                f"({type(error).__name__}: {error})."
            ) from error
        if not any(candidate.measured for candidate in candidates):
            raise ValueError("text must hold a candidate that was measured, got none.")
        return cls(cast(T, None), candidates, about, from_cache)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a finite number")
