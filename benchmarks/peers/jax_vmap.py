"""`jax.vmap` by hand, over the time axis."""

import jax

from benchmarks.candidate import Candidate
from benchmarks.layers import whole


def candidate(case) -> Candidate:
    over_time = lambda step: jax.vmap(step, in_axes=(None, 1), out_axes=1)
    return Candidate("jax.vmap", whole(case.layer, over_time))
