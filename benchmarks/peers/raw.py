"""Plain `jax.numpy` without any transform: the floor."""

import math

from benchmarks.candidate import Candidate
from benchmarks.layers import whole


def candidate(case) -> Candidate:
    """Layers over the last axis need no time axis; the others get it in the batch."""
    needs_batch = case.layer in ("conv net", "attention")
    over_time = _in_the_batch if needs_batch else lambda step: step
    return Candidate("raw jnp", whole(case.layer, over_time))


def _in_the_batch(step):
    def apply(params, x):
        y = step(params, x.reshape(math.prod(x.shape[:2]), *x.shape[2:]))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    return apply
