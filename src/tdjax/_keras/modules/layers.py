"""Keras' layers with weights as Flax modules: Flax's own where they do the job.

Parameters have Flax's names and Keras' shapes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tdjax._keras.modules import initializers
from tdjax._keras.modules.activations import Activation

LINEAR = Activation("linear")
# Run-time type checks can't handle Flax's type of the field `promote_dtype`, a
# protocol, so the subclasses declare it again.


class _Activated:
    """Adds an activation to a layer of Flax. A subclass declares the field."""

    activation: Callable

    def __call__(self, inputs):
        return self.activation(super().__call__(inputs))  # pyright: ignore


class Dense(_Activated, nn.Dense):
    """`nn.Dense` with an activation."""

    promote_dtype: Any = promote_dtype
    kernel_init: Any = initializers.glorot_uniform
    activation: Callable = LINEAR


class Embedding(nn.Embed):
    """`nn.Embed` that takes any numbers and may mask the zeros."""

    promote_dtype: Any = promote_dtype
    embedding_init: Any = initializers.embedding
    mask_zero: bool = False

    def __call__(self, inputs):
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = inputs.astype(jnp.int32)
        return super().__call__(inputs)

    def compute_mask(self, inputs, mask):
        return inputs != 0 if self.mask_zero else None


class Conv(_Activated, nn.Conv):
    """`nn.Conv` with an activation."""

    promote_dtype: Any = promote_dtype
    kernel_init: Any = initializers.glorot_uniform
    activation: Callable = LINEAR


class ConvTranspose(_Activated, nn.ConvTranspose):
    """`nn.ConvTranspose` with an activation."""

    promote_dtype: Any = promote_dtype
    kernel_init: Any = initializers.glorot_uniform
    activation: Callable = LINEAR


class DepthwiseConv(nn.Module):
    """A convolution of each channel by itself.

    Parameters: `kernel`, `(*kernel_size, channels, multiplier)`, and `bias`.
    """

    kernel_size: tuple[int, ...]
    multiplier: int = 1
    strides: tuple[int, ...] = (1,)
    padding: str = "VALID"
    kernel_dilation: tuple[int, ...] = (1,)
    use_bias: bool = True
    activation: Callable = LINEAR
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        channels = inputs.shape[-1]
        shape = (*self.kernel_size, channels, self.multiplier)
        init = initializers.glorot_uniform
        kernel = self.param("kernel", init, shape, self.param_dtype)
        inputs, kernel = promote_dtype(inputs, kernel, dtype=self.dtype)
        outputs = _convolve_channels(self, inputs, kernel)
        if self.use_bias:
            size = (channels * self.multiplier,)
            bias = self.param("bias", nn.initializers.zeros, size, self.param_dtype)
            outputs = outputs + bias.astype(outputs.dtype)
        return self.activation(outputs)


def _convolve_channels(layer, inputs, kernel):
    spatial = "DHW"[-len(layer.kernel_size) :]
    return jax.lax.conv_general_dilated(
        inputs,
        kernel.reshape(*layer.kernel_size, 1, -1),
        layer.strides,
        layer.padding,
        rhs_dilation=layer.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=inputs.shape[-1],
    )


class PReLU(nn.Module):
    """A relu with a slope below zero for each feature; axes of size 1 share it."""

    shape: tuple[int, ...]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        alpha = self.param("alpha", nn.initializers.zeros, self.shape, self.param_dtype)
        below = -alpha.astype(inputs.dtype) * nn.relu(-inputs)
        return nn.relu(inputs) + below
