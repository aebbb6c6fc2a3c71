"""Random layers of Flax with random settings: tuned, each is still the layer.

The reference is the layer called on one step after the other, on other numbers than
those that it was tuned on, and with another batch.
"""

import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tdjax
from helpers import assert_trees_close, normal, quick_compile

pytestmark = pytest.mark.slow
T = 4
NORMS = ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm"]


def draw_linen(draw):
    """A layer of Linen, and the shape of an example of one step."""
    width, bias = draw.choice([1, 3, 8]), draw.random() < 0.5
    kind = draw.choice(["dense", "conv", "transpose", "norm", "attention", "whole"])
    if kind == "dense":
        layer = draw.choice(
            [
                nn.Dense(width, use_bias=bias),
                nn.DenseGeneral((2, width), use_bias=bias),
                nn.Sequential([nn.Dense(4), nn.gelu, nn.Dense(width)]),
            ]
        )
        return layer, (draw.choice([1, 3]),) * draw.randint(0, 1) + (4,)
    size = draw.choice([1, 2, 3])
    padding = draw.choice(["SAME", "VALID", "CIRCULAR"])
    if kind == "conv":
        groups = draw.choice([1, 2])
        settings = {"strides": draw.choice([1, 2]), "feature_group_count": groups}
        layer = nn.Conv(
            2 * width, (size, size), padding=padding, use_bias=bias, **settings
        )
        return layer, (6, 5, 4)
    if kind == "transpose":
        layer = nn.ConvTranspose(width, (size,), strides=(draw.choice([1, 2]),))
        return layer, (5, 4)
    if kind == "norm":
        name = draw.choice(NORMS)
        settings = {"use_bias": bias, "use_scale": draw.random() < 0.5}
        if name == "GroupNorm":
            settings["num_groups"] = draw.choice([1, 2, 4])
        if name == "BatchNorm":
            settings["use_running_average"] = True
        if name == "RMSNorm":
            del settings["use_bias"]
        return getattr(nn, name)(**settings), (3, 4)
    if kind == "attention":
        heads = draw.choice([1, 2])
        return nn.MultiHeadDotProductAttention(heads, use_bias=bias), (3, 4)
    return draw.choice([Classifier(width), Mixer(width)]), (6, 6, 2)


class Classifier(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(self.width, (3, 3))(x)), (2, 2), (2, 2))
        return nn.log_softmax(nn.Dense(3)(x.reshape(x.shape[0], -1)))


class Mixer(nn.Module):
    """It mixes the examples of a batch, once its parameter is not zero."""

    width: int

    @nn.compact
    def __call__(self, x):
        mix = self.param("mix", nn.initializers.zeros, ())
        y = nn.Dense(self.width)(x)
        return y + mix * y.mean(0)


def draw_nnx(draw):
    rngs, width = nnx.Rngs(draw.randrange(100)), draw.choice([1, 3, 8])
    bias = draw.random() < 0.5
    layers = [
        (nnx.Linear(4, width, use_bias=bias, rngs=rngs), (4,)),
        (nnx.LinearGeneral(4, (2, width), use_bias=bias, rngs=rngs), (4,)),
        (nnx.Conv(4, width, (3,), strides=draw.choice([1, 2]), rngs=rngs), (6, 4)),
        (nnx.Conv(4, 4, (2, 2), feature_group_count=2, rngs=rngs), (5, 6, 4)),
        (nnx.LayerNorm(4, use_bias=bias, rngs=rngs), (3, 4)),
        (nnx.RMSNorm(4, rngs=rngs), (3, 4)),
        (nnx.GroupNorm(4, num_groups=2, rngs=rngs), (3, 4)),
        (nnx.BatchNorm(4, use_running_average=True, rngs=rngs), (4,)),
        (nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs), (3, 4)),
        (nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu), (2, 4)),
    ]
    return draw.choice(layers)


def draw_options(draw):
    chunk = draw.choice([None, 1, 2, 3])
    unroll = draw.choice([1, True]) if chunk else 1
    return {"chunk_size": chunk, "unroll": unroll, "remat": draw.random() < 0.3}


def step_by_step(run):
    return lambda params, x: jnp.stack([run(params, x[:, t]) for t in range(T)], 1)


def compare(tuned, step, params, shape, seed):
    """Outputs and gradients, on numbers that are new to the tuner."""
    x = normal(seed + 1, *shape)
    cotangent = None

    def everything(apply):
        def run(params, x):
            y, pullback = jax.vjp(apply, params, x)
            return y, pullback(cotangent)

        return run

    reference = step_by_step(step)
    cotangent = normal(seed + 2, *jax.eval_shape(reference, params, x).shape)
    want = quick_compile(everything(reference), params, x)
    assert_trees_close(quick_compile(everything(tuned), params, x), want, 1e-3, 1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_a_tuned_layer_of_linen_is_the_layer(seed):
    draw = random.Random(seed)
    layer, shape = draw_linen(draw)
    given = tdjax.linen.TimeDistributed(layer, **draw_options(draw))
    x = normal(seed, draw.choice([1, 3]), T, *shape)
    variables = given.init(jax.random.key(seed), x)
    argnums = draw.choice([None, 0, (0, 1)]) if jax.tree.leaves(variables) else None
    result = tdjax.linen.autotune(given, variables, x, argnums=argnums, budget=8)
    # Parameters as after some training: none is zero.
    params = jax.tree.map(lambda p: p + 0.1, variables)
    run = lambda module: lambda variables, x: module.apply(variables, x)
    for batch in (x.shape[0], 2):
        shape_of_x = (batch, T, *shape)
        compare(run(result.tuned), run(layer), params, shape_of_x, seed)


@pytest.mark.parametrize("seed", range(20))
def test_a_tuned_layer_of_nnx_is_the_layer(seed):
    draw = random.Random(seed)
    layer, shape = draw_nnx(draw)
    given = tdjax.nnx.TimeDistributed(layer, **draw_options(draw))
    x = normal(seed, draw.choice([1, 3]), T, *shape)
    argnums = draw.choice([None, 0, (0, 1)])
    result = tdjax.nnx.autotune(given, x, argnums=argnums, budget=8)

    def run(module):
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        return lambda params, x: nnx.merge(graphdef, params, rest)(x), params

    (tuned, params), (step, _) = run(result.tuned), run(layer)
    params = jax.tree.map(lambda p: p + 0.1, params)
    single = lambda params, x: step(params["layer"], x)
    for batch in (x.shape[0], 2):
        compare(tuned, single, params, (batch, T, *shape), seed)
