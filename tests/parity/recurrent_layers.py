"""What the tests of recurrent layers share."""

import functools

import jax.numpy as jnp
import keras
import pytest

from helpers import normal
from parity.keras_parity import vary
from tdjax._keras.convert import to_flax

BATCH, TIME, FEATURES, UNITS = 4, 4, 3, 2
X = normal(0, BATCH, TIME, FEATURES)
# Full, ragged, with holes from the first step on, and without a valid step.
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
LAYERS = {
    "SimpleRNN": keras.layers.SimpleRNN,
    "LSTM": keras.layers.LSTM,
    "GRU": keras.layers.GRU,
    "GRU v1": functools.partial(keras.layers.GRU, reset_after=False),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def build(layer, x=X):
    layer.build(x.shape)
    return layer


def convert(layer, x=X):
    """The module and its variables, none of them zero."""
    return to_flax(vary(build(layer, x)))
