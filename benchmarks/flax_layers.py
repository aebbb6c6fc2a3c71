"""The layers in Flax, Linen and NNX, for tdjax's adapters and for Flax's own vmap."""

import flax.linen as nn
from flax import nnx

from benchmarks.candidate import same
from benchmarks.layers import CHANNELS, CONVOLUTIONS, HEADS, over_head


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(x))
        return nn.Dense(x.shape[-1])(hidden)


class LinenNormBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.relu(nn.Dense(x.shape[-1])(nn.LayerNorm(name="norm")(x)))


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in CONVOLUTIONS:
            x = nn.relu(nn.Conv(CHANNELS, (3, 3), name=name)(x))
        return x


def linen_layer(case) -> nn.Module:
    """The layer; its dtype is the input's, as in the other candidates."""
    width = case.x.shape[-1]
    make = {
        "Dense": lambda: nn.Dense(width),
        "MLP": LinenMLP,
        "LayerNorm block": LinenNormBlock,
        "conv net": LinenConvNet,
        "attention": lambda: nn.MultiHeadDotProductAttention(HEADS),
        "GRU and head": lambda: nn.Dense(width),
    }
    return make[case.layer]()


def flax_params(case):
    """To Flax's parameters, of what goes over time (so of the head, after a GRU)."""
    return over_head(case, _with_heads if case.layer == "attention" else same)


def _with_heads(params):
    native = {name: _split_heads(params[name]) for name in ("query", "key", "value")}
    out = params["out"]
    heads = out["kernel"].reshape(HEADS, -1, out["kernel"].shape[-1])
    return {**native, "out": {"kernel": heads, "bias": out["bias"]}}


def _split_heads(params):
    width = params["kernel"].shape[0]
    kernel = params["kernel"].reshape(width, HEADS, -1)
    return {"kernel": kernel, "bias": params["bias"].reshape(HEADS, -1)}


class NNXMLP(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.Dense_0 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.Dense_1 = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.Dense_1(nnx.gelu(self.Dense_0(x)))


class NNXNormBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.Dense_0 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.Dense_0(self.norm(x)))


class NNXConvNet(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs):
        for name in CONVOLUTIONS:
            setattr(self, name, nnx.Conv(channels, CHANNELS, (3, 3), rngs=rngs))
            channels = CHANNELS

    def __call__(self, x):
        for name in CONVOLUTIONS:
            x = nnx.relu(getattr(self, name)(x))
        return x


def nnx_layer(case, rngs: nnx.Rngs) -> nnx.Module:
    width = case.x.shape[-1]
    make = {
        "Dense": lambda: nnx.Linear(width, width, rngs=rngs),
        "MLP": lambda: NNXMLP(width, rngs),
        "LayerNorm block": lambda: NNXNormBlock(width, rngs),
        "conv net": lambda: NNXConvNet(width, rngs),
        "attention": lambda: nnx.MultiHeadAttention(
            HEADS, width, decode=False, rngs=rngs
        ),
        "GRU and head": lambda: nnx.Linear(width, width, rngs=rngs),
    }
    return make[case.layer]()


def with_params(layer: nnx.Module, params) -> nnx.Module:
    """The same module object with the given parameters."""
    _, state = nnx.split(layer)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)
    return layer
