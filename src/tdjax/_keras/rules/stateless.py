"""Rules for the layers of Keras without weights."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import layers

from tdjax._keras.modules import merging, stateless
from tdjax._keras.modules.activations import Activation
from tdjax._keras.registry import refuse, register_rule, where
from tdjax._keras.rules.activations import activation
from tdjax._keras.rules.layers import Converted, require_channels_last


@register_rule(layers.Activation)
def convert_activation(layer: layers.Activation) -> Converted:
    return stateless.Activation(activation(layer.activation, where(layer))), {}


@register_rule(layers.Identity)
@register_rule(layers.ActivityRegularization)
def convert_identity(layer: Any) -> Converted:
    return _function("linear")


@register_rule(layers.ReLU)
def convert_relu(layer: layers.ReLU) -> Converted:
    return _function(
        "relu",
        negative_slope=layer.negative_slope,
        max_value=layer.max_value,
        threshold=layer.threshold,
    )


@register_rule(layers.LeakyReLU)
def convert_leaky_relu(layer: layers.LeakyReLU) -> Converted:
    return _function("leaky_relu", negative_slope=layer.negative_slope)


@register_rule(layers.ELU)
def convert_elu(layer: layers.ELU) -> Converted:
    return _function("elu", alpha=layer.alpha)


def _function(name: str, **options: Any) -> Converted:
    function = Activation(name)
    if options:
        function = functools.partial(function, **options)
    return stateless.Activation(function), {}


@register_rule(layers.Softmax)
def convert_softmax(layer: layers.Softmax) -> Converted:
    axis = layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
    return stateless.Softmax(axis), {}


@register_rule(layers.Masking)
def convert_masking(layer: layers.Masking) -> Converted:
    return stateless.Masking(_numbers(layer.mask_value)), {}


@register_rule(layers.Rescaling)
def convert_rescaling(layer: layers.Rescaling) -> Converted:
    scale, offset = _numbers(layer.scale), _numbers(layer.offset)
    return stateless.Rescaling(scale, offset, layer.compute_dtype), {}


def _numbers(value: Any) -> Any:
    """A number, or numbers as a tuple: fields of modules are hashed."""
    values = np.asarray(value)
    return values.item() if values.ndim == 0 else tuple(values.tolist())


@register_rule(layers.Flatten)
def convert_flatten(layer: layers.Flatten) -> Converted:
    require_channels_last(layer)
    return stateless.Flatten(), {}


@register_rule(layers.Reshape)
def convert_reshape(layer: layers.Reshape) -> Converted:
    return stateless.Reshape(tuple(layer.target_shape)), {}


@register_rule(layers.Permute)
def convert_permute(layer: layers.Permute) -> Converted:
    return stateless.Permute(tuple(layer.dims)), {}


@register_rule(layers.RepeatVector)
def convert_repeat_vector(layer: layers.RepeatVector) -> Converted:
    return stateless.RepeatVector(layer.n), {}


@register_rule(layers.ZeroPadding1D)
@register_rule(layers.ZeroPadding2D)
@register_rule(layers.ZeroPadding3D)
def convert_zero_padding(layer: Any) -> Converted:
    require_channels_last(layer)
    return stateless.ZeroPadding(_pairs(layer.padding)), {}


@register_rule(layers.Cropping1D)
@register_rule(layers.Cropping2D)
@register_rule(layers.Cropping3D)
def convert_cropping(layer: Any) -> Converted:
    require_channels_last(layer)
    return stateless.Cropping(_pairs(layer.cropping)), {}


def _pairs(ends: Any) -> tuple[tuple[int, int], ...]:
    """One pair per axis; Keras' layers for one axis have the pair alone."""
    pairs = (ends,) if isinstance(ends[0], int) else ends
    return tuple((before, after) for before, after in pairs)


@register_rule(layers.UpSampling1D)
@register_rule(layers.UpSampling2D)
@register_rule(layers.UpSampling3D)
def convert_up_sampling(layer: Any) -> Converted:
    require_channels_last(layer)
    interpolation = getattr(layer, "interpolation", "nearest")
    if interpolation != "nearest":
        raise refuse(
            layer,
            f"interpolation must be 'nearest', got interpolation={interpolation!r}.",
        )
    size = (layer.size,) if isinstance(layer.size, int) else tuple(layer.size)
    return stateless.UpSampling(size), {}


def _convert_pooling(module_class: Any, layer: Any) -> Converted:
    require_channels_last(layer)
    settings = layer.pool_size, layer.strides, layer.padding.upper()
    return module_class(*settings), {}


def _convert_global_pooling(module_class: Any, layer: Any) -> Converted:
    require_channels_last(layer)
    return module_class(layer.keepdims), {}


def _convert_merge(module_class: Any, layer: Any) -> Converted:
    return module_class(), {}


@register_rule(layers.Concatenate)
def convert_concatenate(layer: layers.Concatenate) -> Converted:
    return merging.Concatenate(layer.axis), {}


@register_rule(layers.Dot)
def convert_dot(layer: Any) -> Converted:
    one, other = (layer.axes,) * 2 if isinstance(layer.axes, int) else layer.axes
    return merging.Dot((one, other), layer.normalize), {}


def _register_family(rule: Callable, module_class: type, *names: str) -> None:
    """One rule, where Keras has a class for each number of axes or each operation."""
    for name in names:
        register_rule(getattr(layers, name))(functools.partial(rule, module_class))


for _pool in ("MaxPooling", "AveragePooling"):
    _names = [f"{_pool}{rank}D" for rank in (1, 2, 3)]
    _register_family(_convert_pooling, getattr(stateless, _pool), *_names)
    _names = [f"Global{name}" for name in _names]
    _global = getattr(stateless, f"Global{_pool}")
    _register_family(_convert_global_pooling, _global, *_names)

for _merge in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"):
    _register_family(_convert_merge, getattr(merging, _merge), _merge)
