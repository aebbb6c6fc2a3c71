"""Rules for the layers of Keras."""

from typing import Any

import flax.linen as nn
import keras

from tdjax import _keras_layers as flax_layers
from tdjax._keras_activations import activation
from tdjax._keras_registry import Variables, register_rule, where


def dtypes(layer: Any) -> dict[str, Any]:
    """The layer's dtype policy, as Flax's modules take it."""
    return {"dtype": layer.compute_dtype, "param_dtype": layer.variable_dtype}


def kernel_and_bias(layer: Any) -> Variables:
    bias = {"bias": layer.bias} if layer.use_bias else {}
    return {"params": {"kernel": layer.kernel, **bias}}


@register_rule(keras.layers.Dense)
def convert_dense(layer: keras.layers.Dense) -> tuple[nn.Module, Variables]:
    module = flax_layers.Dense(
        layer.units,
        use_bias=layer.use_bias,
        activation=activation(layer.activation, where(layer)),
        **dtypes(layer),
    )
    return module, kernel_and_bias(layer)
