"""Keras models as Flax modules with their variables, and the way back."""

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np

from tdjax import _keras_models, _keras_rules  # noqa: F401
from tdjax._checks import describe
from tdjax._keras_registry import Variables, convert_layer


def to_flax(model: Any) -> tuple[nn.Module, Variables]:
    """Turns a Keras model into a Flax Linen module and its variables."""
    module, tree = convert_layer(model)
    return module, jax.tree.map(_value, tree)


def _value(variable: Any) -> jax.Array:
    return jnp.asarray(keras.ops.convert_to_numpy(variable))
