"""The layers under test: one step of each in plain `jax.numpy`, and its parameters.

Parameters have the names and shapes that Flax's layers have; each peer reorders them
to its own before the clock starts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

HEADS = 4
CONVOLUTIONS = ("Conv_0", "Conv_1", "Conv_2")
CHANNELS = 16


class Layer(NamedTuple):
    """`init(key, x_step)` makes parameters for `step(params, x_step)`."""

    init: Callable[..., Any]
    step: Callable[..., jax.Array]


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def mlp(params, x):
    return dense(params["Dense_1"], jax.nn.gelu(dense(params["Dense_0"], x)))


def norm_block(params, x):
    return x + jax.nn.relu(dense(params["Dense_0"], layer_norm(params["norm"], x)))


def layer_norm(params, x):
    mean = jnp.mean(x, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6) * params["scale"]
    return (x - mean) * scale + params["bias"]


def conv_net(params, x):
    for name in CONVOLUTIONS:
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x + params[name]["bias"])
    return x


def attention(params, x):
    """Tokens of one step attend to each other: (batch, tokens, features)."""
    split = lambda name: dense(params[name], x).reshape(*x.shape[:-1], HEADS, -1)
    query, key, value = map(split, ("query", "key", "value"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query / query.shape[-1] ** 0.5, key)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
    return dense(params["out"], y.reshape(x.shape))


def gru(params, x):
    """The recurrence itself, by Flax: (batch, time, features), not a step."""
    features = params["hn"]["bias"].shape[0]
    return nn.RNN(nn.GRUCell(features)).apply({"params": {"cell": params}}, x)


def _init_dense(key, features, out=None):
    kernel, bias = jax.random.split(key)
    out = out or features
    return {
        "kernel": jax.random.normal(kernel, (features, out)) / features**0.5,
        "bias": 0.1 * jax.random.normal(bias, (out,)),
    }


def _init_mlp(key, x):
    first, second = jax.random.split(key)
    width, hidden = x.shape[-1], 4 * x.shape[-1]
    return {
        "Dense_0": _init_dense(first, width, hidden),
        "Dense_1": _init_dense(second, hidden, width),
    }


def _init_norm_block(key, x):
    width = x.shape[-1]
    first, second = jax.random.split(key)
    scale = 1 + 0.1 * jax.random.normal(first, (width,))
    norm = {"scale": scale, "bias": 0.1 * scale}
    return {"norm": norm, "Dense_0": _init_dense(second, width)}


def _init_conv_net(key, x):
    params, channels = {}, x.shape[-1]
    for name, each in zip(CONVOLUTIONS, jax.random.split(key, len(CONVOLUTIONS))):
        shape = (3, 3, channels, CHANNELS)
        kernel = jax.random.normal(each, shape) / (9 * channels) ** 0.5
        bias = 0.1 * jax.random.normal(each, (CHANNELS,))
        params[name], channels = {"kernel": kernel, "bias": bias}, CHANNELS
    return params


def _init_attention(key, x):
    names = ("query", "key", "value", "out")
    keys = jax.random.split(key, len(names))
    return {name: _init_dense(k, x.shape[-1]) for name, k in zip(names, keys)}


def _init_gru(key, x):
    cell, head = jax.random.split(key)
    module = nn.RNN(nn.GRUCell(x.shape[-1], bias_init=nn.initializers.normal(0.1)))
    params = module.init(cell, x[:, None])["params"]["cell"]
    return {"gru": params, "head": _init_dense(head, x.shape[-1])}


LAYERS = {
    "Dense": Layer(lambda key, x: _init_dense(key, x.shape[-1]), dense),
    "MLP": Layer(_init_mlp, mlp),
    "LayerNorm block": Layer(_init_norm_block, norm_block),
    "conv net": Layer(_init_conv_net, conv_net),
    "attention": Layer(_init_attention, attention),
    "GRU and head": Layer(_init_gru, dense),
}


def whole(layer: str, over_time: Callable) -> Callable:
    """The model: `over_time(step)` for most; a GRU has its head only over time."""
    apply = over_time(LAYERS[layer].step)
    if layer != "GRU and head":
        return apply
    return lambda params, x: apply(params["head"], gru(params["gru"], x))


def over_head(case, convert: Callable) -> Callable:
    """A conversion of the parameters of what `whole` puts over time."""
    if case.layer != "GRU and head":
        return convert
    return lambda params: {"gru": params["gru"], "head": convert(params["head"])}
