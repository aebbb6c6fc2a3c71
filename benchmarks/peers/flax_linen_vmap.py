"""Flax Linen: `nn.vmap` over time, parameters shared."""

import flax.linen as nn

from benchmarks.candidate import Candidate
from benchmarks.flax_layers import flax_params, linen_layer
from benchmarks.layers import whole


def candidate(case) -> Candidate:
    layer = linen_layer(case)
    mapped = nn.vmap(
        lambda layer, x: layer(x),
        in_axes=1,
        out_axes=1,
        variable_axes={"params": None},
        split_rngs={"params": False},
    )

    def apply(params, x):
        return nn.apply(lambda layer: mapped(layer, x), layer)({"params": params})

    return Candidate(
        "flax nn.vmap", whole(case.layer, lambda step: apply), flax_params(case)
    )
