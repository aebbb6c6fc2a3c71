"""Keras 3 on the JAX backend: `keras.layers.TimeDistributed`, called statelessly."""

import os

import jax.numpy as jnp
import numpy as np

from benchmarks.candidate import Candidate
from benchmarks.layers import CHANNELS, CONVOLUTIONS, HEADS

# It unrolls the steps: at 1024 of them a gradient takes minutes to compile.
_MOST_STEPS = 256


def candidate(case, most_steps: int = _MOST_STEPS) -> Candidate:
    if case.timesteps > most_steps:
        raise NotImplementedError(
            f"unrolls {case.timesteps} steps; see the compile suite"
        )
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    shape, dtype = case.x.shape[1:], case.x.dtype.name
    model = keras.Sequential([keras.Input(shape, dtype=dtype)])
    if case.layer == "GRU and head":
        model.add(keras.layers.GRU(shape[-1], return_sequences=True, dtype=dtype))
    layer = _layers(keras, shape[1:], dtype)[case.layer]()
    model.add(keras.layers.TimeDistributed(layer, dtype=dtype))

    state = [each.value for each in model.non_trainable_variables]  # RNG seeds

    def apply(variables, x):
        return model.stateless_call(variables, state, x)[0]

    name = "Keras TimeDistributed"
    if case.layer != "GRU and head":
        return Candidate(name, apply, _NATIVE.get(case.layer, _leaves))
    of_gradients = lambda params: _gru(params, gradient=True)
    return Candidate(name, apply, _gru, gradients_to_native=of_gradients)


def _layers(keras, shape: tuple, dtype: str) -> dict:
    width, layers = shape[-1], keras.layers

    def model(build):
        x = keras.Input(shape, dtype=dtype)
        return keras.Model(x, build(x))

    def mlp(x):
        x = layers.Dense(4 * width, dtype=dtype)(x)
        gelu = lambda x: keras.activations.gelu(x, approximate=True)
        return layers.Dense(width, dtype=dtype)(layers.Activation(gelu, dtype=dtype)(x))

    def norm_block(x):
        y = layers.LayerNormalization(epsilon=1e-6, dtype=dtype)(x)
        y = layers.Dense(width, activation="relu", dtype=dtype)(y)
        return layers.Add(dtype=dtype)([x, y])

    def conv_net(x):
        for _ in CONVOLUTIONS:
            x = layers.Conv2D(
                CHANNELS, 3, padding="same", activation="relu", dtype=dtype
            )(x)
        return x

    def attention(x):
        return layers.MultiHeadAttention(HEADS, width // HEADS, dtype=dtype)(x, x)

    return {
        "Dense": lambda: layers.Dense(width, dtype=dtype),
        "GRU and head": lambda: layers.Dense(width, dtype=dtype),
        "MLP": lambda: model(mlp),
        "LayerNorm block": lambda: model(norm_block),
        "conv net": lambda: model(conv_net),
        "attention": lambda: model(attention),
    }


def _leaves(params) -> list:
    return [params["kernel"], params["bias"]]


def _by_name(params) -> list:
    return [leaf for name in sorted(params) for leaf in _leaves(params[name])]


def _norm_block(params) -> list:
    norm = [params["norm"]["scale"], params["norm"]["bias"]]
    return [*norm, *_leaves(params["Dense_0"])]


def _attention(params) -> list:
    native = []
    for name in ("query", "key", "value"):
        kernel, bias = _leaves(params[name])
        native += [kernel.reshape(len(kernel), HEADS, -1), bias.reshape(HEADS, -1)]
    kernel, bias = _leaves(params["out"])
    return [*native, kernel.reshape(HEADS, -1, kernel.shape[-1]), bias]


def _gru(params, gradient: bool = False) -> list:
    cell = params["gru"]
    join = lambda names: jnp.concatenate([cell[n]["kernel"] for n in names], -1)
    bias = [cell[name]["bias"] for name in ("iz", "ir", "in")]
    # The update and reset gates have two biases that are added.
    second = bias[:2] if gradient else [np.zeros_like(b) for b in bias[:2]]
    biases = jnp.stack(
        [jnp.concatenate(bias), jnp.concatenate([*second, cell["hn"]["bias"]])]
    )
    kernels = [join(("iz", "ir", "in")), join(("hz", "hr", "hn"))]
    return [*kernels, biases, *_leaves(params["head"])]


_NATIVE = {
    "MLP": _by_name,
    "conv net": _by_name,
    "LayerNorm block": _norm_block,
    "attention": _attention,
}
