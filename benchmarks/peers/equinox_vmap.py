"""Equinox: layers of one example, under one `jax.vmap` for batch and one for time.

Its convolutions are channels-first, so they get channels-first images.
"""

import jax

from benchmarks.candidate import Candidate
from benchmarks.layers import CHANNELS, CONVOLUTIONS, HEADS, over_head, whole


def candidate(case) -> Candidate:
    import equinox as eqx

    layer = _layers(eqx, case.x.shape[-1])[case.layer]
    over_time = lambda step: jax.vmap(jax.vmap(layer, (None, 0)), (None, 0))
    axes = (0, 1, 4, 2, 3) if case.layer == "conv net" else None
    to_native = over_head(case, _native(case.layer))
    return Candidate(
        "Equinox, vmap twice", whole(case.layer, over_time), to_native, axes
    )


def _layers(eqx, width: int) -> dict:
    key = jax.random.key(0)

    def put(layer, params):
        where = lambda each: (each.weight, each.bias)
        return eqx.tree_at(where, layer, (params["weight"], params["bias"]))

    narrow, wide = eqx.nn.Linear(width, width, key=key), 4 * width
    up, down = eqx.nn.Linear(width, wide, key=key), eqx.nn.Linear(wide, width, key=key)
    norm = eqx.nn.LayerNorm(width, eps=1e-6)
    linear = lambda params, x: put(narrow, params)(x)

    def mlp(params, x):
        return put(down, params["Dense_1"])(jax.nn.gelu(put(up, params["Dense_0"])(x)))

    def norm_block(params, x):
        y = put(norm, params["norm"])(x)
        return x + jax.nn.relu(put(narrow, params["Dense_0"])(y))

    def conv_net(params, x):
        for name in CONVOLUTIONS:
            conv = eqx.nn.Conv2d(x.shape[0], CHANNELS, 3, padding="SAME", key=key)
            x = jax.nn.relu(put(conv, params[name])(x))
        return x

    def attention(params, x):
        biases = ("query", "key", "value", "output")
        biases = {f"use_{name}_bias": True for name in biases}
        layer = eqx.nn.MultiheadAttention(HEADS, width, **biases, key=key)
        names = {"query": "query", "key": "key", "value": "value", "out": "output"}
        for ours, theirs in names.items():
            where = lambda each, name=f"{theirs}_proj": getattr(each, name)
            layer = eqx.tree_at(where, layer, put(where(layer), params[ours]))
        return layer(x, x, x)

    return {
        "Dense": linear,
        "GRU and head": linear,
        "MLP": mlp,
        "LayerNorm block": norm_block,
        "conv net": conv_net,
        "attention": attention,
    }


def _native(layer: str):
    if layer in ("Dense", "GRU and head"):
        return _linear
    if layer == "conv net":
        return lambda params: {name: _conv(each) for name, each in params.items()}
    return lambda params: {name: _linear(each) for name, each in params.items()}


def _linear(params):
    if "scale" in params:
        return {"weight": params["scale"], "bias": params["bias"]}
    return {"weight": params["kernel"].T, "bias": params["bias"]}


def _conv(params):
    weight = params["kernel"].transpose(3, 2, 0, 1)
    return {"weight": weight, "bias": params["bias"][:, None, None]}
