"""Rules for the layers of Keras without weights."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from keras import layers

from tdjax._keras.modules import merging, stateless
from tdjax._keras.modules.activations import Activation
from tdjax._keras.registry import refuse, register_rule, where
from tdjax._keras.rules.activations import activation
from tdjax._keras.rules.layers import Converted, require_channels_last


def _function(name: str, **options: Any) -> nn.Module:
    function = Activation(name)
    if options:
        function = functools.partial(function, **options)
    return stateless.Activation(function)


def _relu(layer: Any) -> nn.Module:
    names = ("negative_slope", "max_value", "threshold")
    return _function("relu", **{name: getattr(layer, name) for name in names})


def _softmax(layer: Any) -> nn.Module:
    axis = layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
    return stateless.Softmax(axis)


def _rescaling(layer: Any) -> nn.Module:
    numbers = _numbers(layer.scale), _numbers(layer.offset)
    return stateless.Rescaling(*numbers, layer.compute_dtype)


def _numbers(value: Any) -> Any:
    """A number, or numbers as a tuple: fields of modules are hashed."""
    values = np.asarray(value)
    return values.item() if values.ndim == 0 else tuple(values.tolist())


def _pairs(ends: Any) -> tuple[tuple[int, int], ...]:
    """One pair per axis; Keras' layers for one axis have a pair instead."""
    pairs = (ends,) if isinstance(ends[0], int) else ends
    return tuple((before, after) for before, after in pairs)


def _up_sampling(layer: Any) -> nn.Module:
    interpolation = getattr(layer, "interpolation", "nearest")
    if interpolation != "nearest":
        raise refuse(
            layer,
            f"interpolation must be 'nearest', got interpolation={interpolation!r}.",
        )
    size = (layer.size,) if isinstance(layer.size, int) else tuple(layer.size)
    return stateless.UpSampling(size)


def _pooling(module_class: Any, layer: Any) -> nn.Module:
    return module_class(layer.pool_size, layer.strides, layer.padding.upper())


def _dot(layer: Any) -> nn.Module:
    one, other = (layer.axes,) * 2 if isinstance(layer.axes, int) else layer.axes
    return merging.Dot((one, other), layer.normalize)


# The module for a layer, by the name of its class.
_MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "Activation": lambda layer: stateless.Activation(
        activation(layer.activation, where(layer))
    ),
    "Identity": lambda layer: _function("linear"),
    "ActivityRegularization": lambda layer: _function("linear"),
    "ReLU": _relu,
    "LeakyReLU": lambda x: _function("leaky_relu", negative_slope=x.negative_slope),
    "ELU": lambda layer: _function("elu", alpha=layer.alpha),
    "Softmax": _softmax,
    "Masking": lambda layer: stateless.Masking(_numbers(layer.mask_value)),
    "Rescaling": _rescaling,
    "Flatten": lambda layer: stateless.Flatten(),
    "Reshape": lambda layer: stateless.Reshape(tuple(layer.target_shape)),
    "Permute": lambda layer: stateless.Permute(tuple(layer.dims)),
    "RepeatVector": lambda layer: stateless.RepeatVector(layer.n),
    "Concatenate": lambda layer: merging.Concatenate(layer.axis),
    "Dot": _dot,
    "Add": lambda layer: merging.Add(),
    "Subtract": lambda layer: merging.Subtract(),
    "Multiply": lambda layer: merging.Multiply(),
    "Average": lambda layer: merging.Average(),
    "Maximum": lambda layer: merging.Maximum(),
    "Minimum": lambda layer: merging.Minimum(),
}
# Likewise for layers of 1, 2 and 3 dimensions: Conv1D, Conv2D, Conv3D.
_OF_EACH_RANK: dict[str, Callable[[Any], nn.Module]] = {
    "ZeroPadding{}D": lambda layer: stateless.ZeroPadding(_pairs(layer.padding)),
    "Cropping{}D": lambda layer: stateless.Cropping(_pairs(layer.cropping)),
    "UpSampling{}D": _up_sampling,
    "MaxPooling{}D": functools.partial(_pooling, stateless.MaxPooling),
    "AveragePooling{}D": functools.partial(_pooling, stateless.AveragePooling),
    "GlobalMaxPooling{}D": lambda x: stateless.GlobalMaxPooling(x.keepdims),
    "GlobalAveragePooling{}D": lambda x: stateless.GlobalAveragePooling(x.keepdims),
}


def _convert(make: Callable[[Any], nn.Module], layer: Any) -> Converted:
    require_channels_last(layer)
    return make(layer), {}


_MODULES |= {
    name.format(rank): make
    for name, make in _OF_EACH_RANK.items()
    for rank in (1, 2, 3)
}
for _name, _make in _MODULES.items():
    register_rule(getattr(layers, _name))(functools.partial(_convert, _make))
