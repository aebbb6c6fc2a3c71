"""Flax Linen: `nn.BatchApply` merges batch and time around a layer."""

import flax.linen as nn

from benchmarks.candidate import Candidate
from benchmarks.flax_layers import flax_params, linen_layer
from benchmarks.layers import whole


def candidate(case) -> Candidate:
    layer = linen_layer(case)

    def apply(params, x):
        return nn.apply(lambda layer: nn.BatchApply(layer)(x), layer)(
            {"params": params}
        )

    return Candidate(
        "flax nn.BatchApply", whole(case.layer, lambda step: apply), flax_params(case)
    )
