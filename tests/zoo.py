"""Layers of many kinds, in Linen and in NNX, each as a function of its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tdjax
from helpers import integers, lowerings, normal, quick_compile

B, T = 2, 4


class Kind(NamedTuple):
    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[jax.Array, ...]
    in_axes: Any = 1
    kwargs: dict[str, Any] = {}


class Gate(nn.Module):
    """A user's own layer of two inputs, one of them shared by all steps."""

    @nn.compact
    def __call__(self, x, shift):
        return nn.Dense(4)(x) * nn.sigmoid(nn.Dense(4, name="gate")(x + shift))


class NnxGate(nnx.Module):
    def __init__(self, rngs):
        self.value = nnx.Linear(3, 4, rngs=rngs)
        self.gate = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, shift):
        return self.value(x) * nnx.sigmoid(self.gate(x + shift))


class Encoder(nn.Module):
    """A sentence encoder: the last state of a GRU over each document's sentences."""

    @nn.compact
    def __call__(self, sentences):
        return nn.RNN(nn.GRUCell(4))(sentences)[..., -1, :]


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))

    def __call__(self, sentences):
        return self.rnn(sentences)[..., -1, :]


class Classifier(nn.Module):
    """A whole sub-model."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(4, (3, 3))(image))
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.log_softmax(nn.Dense(3)(nn.LayerNorm()(x)))


class NnxClassifier(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, image):
        x = nnx.relu(self.conv(image))
        x = nnx.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nnx.log_softmax(self.head(self.norm(x)))


vectors = normal(0, B, T, 3)
rows = normal(1, B, T, 4, 3)
images = normal(2, B, T, 4, 4, 2)
tokens = jnp.abs(integers(3, B, T, 3)).astype(jnp.int32)

ZOO = {
    "Dense": Kind(lambda: nn.Dense(4), lambda r: nnx.Linear(3, 4, rngs=r), (vectors,)),
    "DenseGeneral": Kind(
        lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)),
        lambda r: nnx.LinearGeneral((4, 3), (2, 3), axis=(-2, -1), rngs=r),
        (rows,),
    ),
    "Einsum": Kind(
        lambda: nn.Einsum((3, 4, 2), "btd,dhe->bthe"),
        lambda r: nnx.Einsum("btd,dhe->bthe", (3, 4, 2), rngs=r),
        (rows,),
    ),
    "Conv 1D": Kind(
        lambda: nn.Conv(4, (3,)), lambda r: nnx.Conv(3, 4, (3,), rngs=r), (rows,)
    ),
    "Conv 2D": Kind(
        lambda: nn.Conv(3, (3, 3), strides=2, padding="VALID"),
        lambda r: nnx.Conv(2, 3, (3, 3), strides=2, padding="VALID", rngs=r),
        (images,),
    ),
    "ConvTranspose": Kind(
        lambda: nn.ConvTranspose(3, (2, 2), strides=(2, 2)),
        lambda r: nnx.ConvTranspose(2, 3, (2, 2), strides=(2, 2), rngs=r),
        (images,),
    ),
    "Embed": Kind(lambda: nn.Embed(5, 3), lambda r: nnx.Embed(5, 3, rngs=r), (tokens,)),
    "LayerNorm": Kind(nn.LayerNorm, lambda r: nnx.LayerNorm(3, rngs=r), (rows,)),
    "GroupNorm": Kind(
        lambda: nn.GroupNorm(2),
        lambda r: nnx.GroupNorm(2, num_groups=2, rngs=r),
        (images,),
    ),
    "RMSNorm": Kind(nn.RMSNorm, lambda r: nnx.RMSNorm(3, rngs=r), (rows,)),
    "BatchNorm, inference": Kind(
        lambda: nn.BatchNorm(use_running_average=True),
        lambda r: nnx.BatchNorm(3, use_running_average=True, rngs=r),
        (vectors,),
    ),
    "Dropout, inference": Kind(
        lambda: nn.Dropout(0.5),
        lambda r: nnx.Dropout(0.5, rngs=r),
        (vectors,),
        kwargs={"deterministic": True},
    ),
    "attention": Kind(
        lambda: nn.MultiHeadDotProductAttention(2, qkv_features=4),
        lambda r: nnx.MultiHeadAttention(2, 3, 4, decode=False, rngs=r),
        (rows,),
    ),
    "Sequential": Kind(
        lambda: nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]),
        lambda r: nnx.Sequential(
            nnx.Linear(3, 4, rngs=r), nnx.relu, nnx.Linear(4, 2, rngs=r)
        ),
        (vectors,),
    ),
    "GRU encoder": Kind(Encoder, NnxEncoder, (rows[:, :, :2],)),
    "sub-model": Kind(Classifier, NnxClassifier, (images,)),
    "own layer, shared input": Kind(
        Gate, NnxGate, (vectors, normal(4, 3)), in_axes=(1, None)
    ),
}


class Functional(NamedTuple):
    """A layer as `(params, *inputs) -> y`: on one step, and over time by options."""

    params: Any
    step: Callable[..., Any]
    over_time: Callable[..., Callable[..., Any]]


def linen_functional(kind: Kind) -> Functional:
    layer = kind.linen()
    first = _step(kind, 0, kind.inputs)
    variables = layer.init(jax.random.key(0), *first, **kind.kwargs)
    params = jax.tree.map(lambda p: p + 0.1, variables.get("params", {}))
    state = {name: v for name, v in variables.items() if name != "params"}
    run = lambda module: (
        lambda params, *inputs: module.apply(
            {"params": params, **state}, *inputs, **kind.kwargs
        )
    )
    wrap = lambda **options: run(
        tdjax.linen.TimeDistributed(layer, in_axes=kind.in_axes, **options)
    )
    return Functional(params, run(layer), wrap)


def nnx_functional(kind: Kind) -> Functional:
    graphdef, params, rest = nnx.split(kind.nnx(nnx.Rngs(0)), nnx.Param, ...)
    params = jax.tree.map(lambda p: p + 0.1, params)

    def run(wrap):
        # A new module of new variables for each trace.
        leaves, treedef = jax.tree.flatten(rest)
        rebuild = lambda params: nnx.merge(
            graphdef, params, jax.tree.unflatten(treedef, leaves)
        )
        return lambda params, *inputs: wrap(rebuild(params))(*inputs, **kind.kwargs)

    wrap = lambda **options: run(
        lambda layer: tdjax.nnx.TimeDistributed(layer, in_axes=kind.in_axes, **options)
    )
    return Functional(params, run(lambda layer: layer), wrap)


def _step(kind: Kind, t: int, inputs):
    in_axes = kind.in_axes if isinstance(kind.in_axes, tuple) else (kind.in_axes,)
    return tuple(x if axis is None else x[:, t] for x, axis in zip(inputs, in_axes))


def deviations(
    kind: Kind, functional: Functional, method: str, every: int = 1
) -> dict[str, float]:
    """The largest deviation of each `every`-th lowering, relative to the largest value.

    Compares outputs and gradients, of parameters and inputs, with a loop over steps.
    Values under 0.01 count as 0.01: some gradients (of an attention's key bias) are
    zero but for rounding.
    """
    weights = None

    def loop(params, *inputs):
        steps = [functional.step(params, *_step(kind, t, inputs)) for t in range(T)]
        return jnp.stack(steps, 1)

    def value_and_gradients(apply, params, inputs):
        differentiable = [i for i, x in enumerate(inputs) if x.dtype == jnp.float32]

        def loss(params, changed):
            args = list(inputs)
            for i, x in zip(differentiable, changed):
                args[i] = x
            y = apply(params, *args)
            return jnp.sum(weights * y), y

        grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            params, [inputs[i] for i in differentiable]
        )
        return y, grads

    weights = normal(9, *jax.eval_shape(loop, functional.params, *kind.inputs).shape)
    options = lowerings(T, (method,), unrolls=(1, True), whole=(None,))
    options = options[::every]

    def everything(params, inputs):
        run = lambda apply: value_and_gradients(apply, params, inputs)
        return run(loop), [run(functional.over_time(**each)) for each in options]

    want, got = quick_compile(everything, functional.params, kind.inputs)
    return {str(each): _deviation(y, want) for each, y in zip(options, got)}


def _deviation(got, want) -> float:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
    ratio = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-2)
    return max(float(ratio(np.float64(a), np.float64(b))) for a, b in pairs)
