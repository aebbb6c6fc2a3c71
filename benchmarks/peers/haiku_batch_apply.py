"""Haiku: `hk.BatchApply` merges batch and time around Haiku's own layers."""

import jax

from benchmarks.candidate import Candidate
from benchmarks.layers import CHANNELS, CONVOLUTIONS, HEADS, over_head, whole


def candidate(case) -> Candidate:
    import haiku as hk

    layer = _layers(hk, case.x.shape[-1])[case.layer]
    model = hk.without_apply_rng(hk.transform(lambda x: hk.BatchApply(layer)(x)))
    to_native = over_head(case, _NATIVE.get(case.layer, _flat))
    apply = whole(case.layer, lambda step: model.apply)
    return Candidate("Haiku BatchApply", apply, to_native)


def _layers(hk, width: int) -> dict:
    linear = lambda x: hk.Linear(width, name="linear")(x)

    def mlp(x):
        hidden = jax.nn.gelu(hk.Linear(4 * width, name="Dense_0")(x))
        return hk.Linear(width, name="Dense_1")(hidden)

    def norm_block(x):
        y = hk.LayerNorm(-1, True, True, eps=1e-6, name="norm")(x)
        return x + jax.nn.relu(hk.Linear(width, name="Dense_0")(y))

    def conv_net(x):
        for name in CONVOLUTIONS:
            x = jax.nn.relu(hk.Conv2D(CHANNELS, 3, name=name)(x))
        return x

    def attention(x):
        init = hk.initializers.VarianceScaling()
        return hk.MultiHeadAttention(
            HEADS, width // HEADS, w_init=init, model_size=width, name="attention"
        )(x, x, x)

    return {
        "Dense": linear,
        "GRU and head": linear,
        "MLP": mlp,
        "LayerNorm block": norm_block,
        "conv net": conv_net,
        "attention": attention,
    }


def _linear(params):
    return {"w": params["kernel"], "b": params["bias"]}


def _flat(params):
    return {"linear": _linear(params)}


def _by_name(params):
    return {name: _linear(each) for name, each in params.items()}


def _norm_block(params):
    norm = {"scale": params["norm"]["scale"], "offset": params["norm"]["bias"]}
    return {"norm": norm, "Dense_0": _linear(params["Dense_0"])}


def _attention(params):
    names = {"query": "query", "key": "key", "value": "value", "out": "linear"}
    return {f"attention/{new}": _linear(params[old]) for old, new in names.items()}


_NATIVE = {
    "MLP": _by_name,
    "conv net": _by_name,
    "LayerNorm block": _norm_block,
    "attention": _attention,
}
