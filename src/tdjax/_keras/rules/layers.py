"""Rules for the layers of Keras that have weights or noise."""

from typing import Any

import flax.linen as nn
from keras import layers

from tdjax._keras.modules import layers as flax_layers
from tdjax._keras.modules import normalization
from tdjax._keras.registry import Variables, refuse, register_rule, where
from tdjax._keras.rules.activations import activation

Converted = tuple[nn.Module, Variables]


def dtypes(layer: Any) -> dict[str, Any]:
    """The layer's dtype policy, as Flax's modules take it."""
    return {"dtype": layer.compute_dtype, "param_dtype": layer.variable_dtype}


def require_channels_last(layer: Any) -> None:
    if getattr(layer, "data_format", None) == "channels_first":
        reason = "data_format='channels_first' is not converted, only 'channels_last'."
        raise refuse(layer, reason)


def _params(**variables: Any) -> Variables:
    """The variables that the layer has, as params."""
    return {"params": {k: v for k, v in variables.items() if v is not None}}


def _activated(layer: Any) -> dict[str, Any]:
    """The fields that Dense and the convolutions share."""
    function = activation(layer.activation, where(layer))
    return {"use_bias": layer.use_bias, "activation": function, **dtypes(layer)}


@register_rule(layers.Dense)
def convert_dense(layer: layers.Dense) -> Converted:
    module = flax_layers.Dense(layer.units, **_activated(layer))
    return module, _params(kernel=layer.kernel, bias=layer.bias)


@register_rule(layers.Embedding)
def convert_embedding(layer: layers.Embedding) -> Converted:
    sizes = layer.input_dim, layer.output_dim
    module = flax_layers.Embedding(*sizes, mask_zero=layer.mask_zero, **dtypes(layer))
    return module, _params(embedding=layer.embeddings)


def _convert_conv(module_class: Any, layer: Any, **fields: Any) -> Converted:
    """A convolution whose module takes Flax's fields."""
    require_channels_last(layer)
    module = module_class(
        kernel_size=layer.kernel_size,
        strides=layer.strides,
        kernel_dilation=layer.dilation_rate,
        **{"padding": layer.padding.upper(), **fields},
        **_activated(layer),
    )
    return module, _params(kernel=layer.kernel, bias=layer.bias)


@register_rule(layers.Conv1D)
@register_rule(layers.Conv2D)
@register_rule(layers.Conv3D)
def convert_conv(layer: Any) -> Converted:
    sizes = {"features": layer.filters, "feature_group_count": layer.groups}
    return _convert_conv(flax_layers.Conv, layer, **sizes)


@register_rule(layers.Conv1DTranspose)
@register_rule(layers.Conv2DTranspose)
@register_rule(layers.Conv3DTranspose)
def convert_conv_transpose(layer: Any) -> Converted:
    padding = tuple(map(_transposed_padding, *_axes(layer)))
    fields = {"features": layer.filters, "padding": padding, "transpose_kernel": True}
    return _convert_conv(flax_layers.ConvTranspose, layer, **fields)


@register_rule(layers.DepthwiseConv1D)
@register_rule(layers.DepthwiseConv2D)
def convert_depthwise_conv(layer: Any) -> Converted:
    multiplier = layer.depth_multiplier
    return _convert_conv(flax_layers.DepthwiseConv, layer, multiplier=multiplier)


def _axes(layer: Any) -> tuple:
    """The settings of a transposed convolution, one of each for each axis."""
    size = len(layer.kernel_size)
    extra = layer.output_padding or (None,) * size
    names = [layer.padding] * size
    return layer.kernel_size, layer.strides, layer.dilation_rate, names, extra


def _transposed_padding(
    size: int, stride: int, dilation: int, padding: str, extra: int | None
) -> tuple[int, int]:
    """Zeros before and after along one axis that give the output Keras' size.

    With "valid" and no `extra` the output is `(n - 1) * stride + max(size, stride)`
    long, with "same" `n * stride`.
    """
    reach = (size - 1) * dilation
    if padding == "valid":
        extra = max(0, stride - reach - 1) if extra is None else extra
        return reach, reach + extra
    odd = (reach + 1) % 2
    total = stride + reach - 1 if extra is None else reach + odd - 1 + extra
    before = min(total - total // 2, reach)
    return before, total - before


@register_rule(layers.PReLU)
def convert_prelu(layer: layers.PReLU) -> Converted:
    module = flax_layers.PReLU(tuple(layer.alpha.shape), layer.variable_dtype)
    return module, _params(alpha=layer.alpha)


@register_rule(layers.BatchNormalization)
def convert_batch_normalization(layer: layers.BatchNormalization) -> Converted:
    if getattr(layer, "renorm", False):
        raise refuse(layer, "renorm=True is not converted.")
    module = normalization.BatchNormalization(
        axis=layer.axis,
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        use_scale=layer.scale,
        use_bias=layer.center,
        frozen=not layer.trainable,
        **dtypes(layer),
    )
    statistics = {"mean": layer.moving_mean, "var": layer.moving_variance}
    return module, {
        **_params(scale=layer.gamma, bias=layer.beta),
        "batch_stats": statistics,
    }


@register_rule(layers.LayerNormalization)
def convert_layer_normalization(layer: Any) -> Converted:
    axes = tuple(layer.axis)
    settings = {"epsilon": layer.epsilon, "feature_axes": axes, **dtypes(layer)}
    if layer.rms_scaling:
        return normalization.VarianceScaling(**settings), _params(scale=layer.gamma)
    module = nn.LayerNorm(
        use_scale=layer.scale,
        use_bias=layer.center,
        reduction_axes=axes,
        use_fast_variance=False,
        **settings,
    )
    return module, _params(scale=layer.gamma, bias=layer.beta)


@register_rule(layers.RMSNormalization)
def convert_rms_normalization(layer: Any) -> Converted:
    axes = tuple(layer.axis)
    module = nn.RMSNorm(
        epsilon=layer.epsilon, reduction_axes=axes, feature_axes=axes, **dtypes(layer)
    )
    return module, _params(scale=layer.scale)


@register_rule(layers.GroupNormalization)
def convert_group_normalization(layer: Any) -> Converted:
    if layer.axis not in (-1, layer.input_spec.ndim - 1):
        raise refuse(layer, f"axis must be the last one, got axis={layer.axis}.")
    module = nn.GroupNorm(
        layer.groups,
        use_fast_variance=False,
        epsilon=layer.epsilon,
        use_scale=layer.scale,
        use_bias=layer.center,
        **dtypes(layer),
    )
    return module, _params(scale=layer.gamma, bias=layer.beta)


@register_rule(layers.Dropout)
def convert_dropout(layer: layers.Dropout) -> Converted:
    shape = None if layer.noise_shape is None else tuple(layer.noise_shape)
    if any(size not in (1, None) for size in shape or ()):
        raise refuse(layer, f"noise_shape may hold 1 and None only, got {shape}.")
    return normalization.Dropout(layer.rate, shape), {}


@register_rule(layers.SpatialDropout1D)
@register_rule(layers.SpatialDropout2D)
@register_rule(layers.SpatialDropout3D)
def convert_spatial_dropout(layer: Any) -> Converted:
    require_channels_last(layer)
    between = (1,) * (layer.input_spec.ndim - 2)
    return normalization.Dropout(layer.rate, (None, *between, None)), {}


@register_rule(layers.GaussianNoise)
def convert_gaussian_noise(layer: layers.GaussianNoise) -> Converted:
    return normalization.GaussianNoise(layer.stddev), {}
