"""What is known of a value in a program for a batch: where the examples are in it.

Programs are those of a batch of any size `n`: an axis whose size depends on `n` holds
the examples. Or they are those of `LARGE_PRIME` examples, and its multiples are the
sizes that depend on their number.
"""

import dataclasses
import functools
from typing import Any, SupportsIndex

from jax import export

# No other axis should have this size, or a multiple of it: if one does, the function is
# refused.
LARGE_PRIME = 10007


@dataclasses.dataclass(frozen=True)
class Shared:
    """The same whatever the examples are, and however many."""


@dataclasses.dataclass(frozen=True)
class PerStep:
    """As `Shared`, and another one for each step: random keys."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The examples are along `axis`, `per_example` elements of it for each."""

    axis: int
    per_example: int = 1

    def on(self, axis: SupportsIndex) -> "Rows":
        """The same along another axis."""
        return Rows(int(axis), self.per_example)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """It may depend on other examples, on the place in the batch or on its size."""

    by: str  # The first operation that may be the reason.


Value = Shared | PerStep | Rows | Mixed


@functools.cache
def any_number() -> Any:
    """The number of examples, `n`; other than 1, which JAX treats apart."""
    return export.symbolic_shape("n", constraints=["n >= 2"])[0]


def follows_examples(size: Any) -> bool:
    """Whether a number depends on the number of examples."""
    if isinstance(size, int) and size > 0:
        return size % LARGE_PRIME == 0
    return export.is_symbolic_dim(size)


def axes_of_examples(shape) -> list[int]:
    """The axes whose size depends on the number of examples."""
    return [axis for axis, size in enumerate(shape) if follows_examples(size)]
