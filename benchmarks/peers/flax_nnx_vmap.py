"""Flax NNX: `nnx.vmap` over time, the module's state shared."""

from flax import nnx

from benchmarks.candidate import Candidate
from benchmarks.flax_layers import flax_params, nnx_layer, with_params
from benchmarks.layers import whole


def candidate(case) -> Candidate:
    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 1), out_axes=1)

    def apply(params, x):
        layer = with_params(nnx_layer(case, nnx.Rngs(0)), params)
        return mapped(layer, x)

    return Candidate(
        "flax nnx.vmap", whole(case.layer, lambda step: apply), flax_params(case)
    )
