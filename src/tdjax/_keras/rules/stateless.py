"""Rules for the layers of Keras without weights."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from keras import layers

from tdjax._keras.modules import merging, stateless
from tdjax._keras.modules.activations import Activation
from tdjax._keras.modules.operations import Operation
from tdjax._keras.registry import refuse, register_rule, where
from tdjax._keras.rules.activations import activation
from tdjax._keras.rules.layers import Converted, require_channels_last


def _function(name: str, **options: Any) -> nn.Module:
    function = Activation(name)
    if options:
        function = functools.partial(function, **options)
    return stateless.Activation(function)


def _operation(name: str, **options: Any) -> nn.Module:
    return Operation(name, tuple(options.items()))


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
    return _operation("up_sampling", size=size)


def _pooling(name: str, layer: Any) -> nn.Module:
    window = {"window_shape": layer.pool_size, "strides": layer.strides}
    return _operation(name, **window, padding=layer.padding.upper())


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
    "Flatten": lambda layer: _operation("flatten"),
    "Reshape": lambda x: _operation("reshape_examples", shape=tuple(x.target_shape)),
    "Permute": lambda layer: _operation("permute", axes=tuple(layer.dims)),
    "RepeatVector": lambda layer: _operation("repeat_vector", n=layer.n),
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
    "ZeroPadding{}D": lambda x: _operation("zero_padding", padding=_pairs(x.padding)),
    "Cropping{}D": lambda x: _operation("cropping", cropping=_pairs(x.cropping)),
    "UpSampling{}D": _up_sampling,
    "MaxPooling{}D": functools.partial(_pooling, "max_pooling"),
    "AveragePooling{}D": functools.partial(_pooling, "average_pooling"),
    "GlobalMaxPooling{}D": lambda x: _operation(
        "global_max_pooling", keepdims=x.keepdims
    ),
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
