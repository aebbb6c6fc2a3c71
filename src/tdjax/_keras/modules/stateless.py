"""Keras' layers without weights as Flax modules."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Activation(nn.Module):
    """A function as a layer."""

    function: Callable

    def __call__(self, inputs):
        return self.function(inputs)


class Softmax(nn.Module):
    """Softmax over one or several axes; zero where masked."""

    axis: int | tuple[int, ...] = -1

    def __call__(self, inputs, mask=None):
        if mask is None:
            return jax.nn.softmax(inputs, self.axis)
        low = -3e4 if inputs.dtype == jnp.float16 else -1e9
        outputs = jax.nn.softmax(jnp.where(mask, inputs, low), self.axis)
        return jnp.where(mask, outputs, 0)


class Masking(nn.Module):
    """Masks the steps whose features all equal `mask_value`."""

    mask_value: Any = 0.0

    def __call__(self, inputs):
        return jnp.where(self.compute_mask(inputs, None)[..., None], inputs, 0)

    def compute_mask(self, inputs, mask):
        return jnp.any(inputs != self.mask_value, axis=-1)


class Rescaling(nn.Module):
    """Scales and moves its input, which becomes floating."""

    scale: float | tuple[float, ...]
    offset: float | tuple[float, ...] = 0.0
    dtype: Any = jnp.float32

    def __call__(self, inputs):
        values = inputs, self.scale, self.offset
        inputs, scale, offset = (jnp.asarray(value, self.dtype) for value in values)
        return inputs * scale + offset


class Flatten(nn.Module):
    """`(batch, ...)` -> `(batch, features)`."""

    def __call__(self, inputs):
        return inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:]))


class Reshape(nn.Module):
    """Reshapes each example; one size may be -1."""

    shape: tuple[int, ...]

    def __call__(self, inputs):
        # JAX can't infer -1 for an empty batch.
        known = -math.prod(self.shape) if -1 in self.shape else 1
        rest = math.prod(inputs.shape[1:]) // known if known else 0
        sizes = (rest if size == -1 else size for size in self.shape)
        return inputs.reshape(inputs.shape[0], *sizes)


class Permute(nn.Module):
    """Reorders the axes of each example, which count from 1."""

    axes: tuple[int, ...]

    def __call__(self, inputs):
        return inputs.transpose(0, *self.axes)


class RepeatVector(nn.Module):
    """`(batch, features)` -> `(batch, n, features)`."""

    n: int

    def __call__(self, inputs):
        return jnp.repeat(inputs[:, None], self.n, axis=1)


class ZeroPadding(nn.Module):
    """Zeros before and after along the axes between batch and features."""

    padding: tuple[tuple[int, int], ...]

    def __call__(self, inputs):
        return jnp.pad(inputs, ((0, 0), *self.padding, (0, 0)))


class Cropping(nn.Module):
    """Cuts both ends of the axes between batch and features."""

    cropping: tuple[tuple[int, int], ...]

    def __call__(self, inputs):
        sizes = inputs.shape[1:]
        cuts = [slice(a, size - b) for (a, b), size in zip(self.cropping, sizes)]
        return inputs[:, *cuts]


class UpSampling(nn.Module):
    """Repeats every step along the axes between batch and features."""

    size: tuple[int, ...]

    def __call__(self, inputs):
        for axis, times in enumerate(self.size, 1):
            inputs = jnp.repeat(inputs, times, axis)
        return inputs


class MaxPooling(nn.Module):
    """The largest value of each window."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str

    def __call__(self, inputs):
        return nn.max_pool(inputs, self.window, self.strides, self.padding)


class AveragePooling(nn.Module):
    """The mean of each window, without its padding."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str

    def __call__(self, inputs):
        settings = self.window, self.strides, self.padding
        return nn.avg_pool(inputs, *settings, count_include_pad=False)


class GlobalMaxPooling(nn.Module):
    """The largest value over the axes between batch and features."""

    keepdims: bool = False

    def __call__(self, inputs):
        return jnp.max(inputs, _between(inputs), keepdims=self.keepdims)


class GlobalAveragePooling(nn.Module):
    """The mean over the axes between batch and features, without masked steps."""

    keepdims: bool = False

    def __call__(self, inputs, mask=None):
        mean = lambda x: jnp.mean(x, _between(x), keepdims=self.keepdims)
        if mask is None:
            return mean(inputs)
        valid = mask[..., None]
        weights = valid.astype(inputs.dtype)
        return mean(jnp.where(valid, inputs, 0)) / mean(weights)

    def compute_mask(self, inputs, mask):
        return None


def _between(x):
    return tuple(range(1, x.ndim - 1))
