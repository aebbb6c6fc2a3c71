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


# Functions of examples, which `Operation` finds by name. Padding and pooling are over
# the axes between batch and features.


def flatten(x):
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def reshape_examples(x, shape):
    """Reshapes each example; one size may be -1."""
    # JAX can't infer -1 for an empty batch.
    known = -math.prod(shape) if -1 in shape else 1
    rest = math.prod(x.shape[1:]) // known if known else 0
    return x.reshape(x.shape[0], *(rest if size == -1 else size for size in shape))


def permute(x, axes):
    """Reorders the axes of each example, which count from 1."""
    return x.transpose(0, *axes)


def repeat_vector(x, n):
    """`(batch, features)` -> `(batch, n, features)`."""
    return jnp.repeat(x[:, None], n, axis=1)


def zero_padding(x, padding):
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def cropping(x, cropping):
    ends = zip(cropping, x.shape[1:])
    return x[:, *(slice(before, size - after) for (before, after), size in ends)]


def up_sampling(x, size):
    for axis, times in enumerate(size, 1):
        x = jnp.repeat(x, times, axis)
    return x


def average_pooling(x, **window):
    """The mean of each window, without its padding."""
    return nn.avg_pool(x, **window, count_include_pad=False)


def global_max_pooling(x, keepdims):
    return jnp.max(x, _between(x), keepdims=keepdims)


_OWN = (flatten, reshape_examples, permute, repeat_vector, zero_padding, cropping)
_OWN += (up_sampling, average_pooling, global_max_pooling)
FUNCTIONS = {"max_pooling": nn.max_pool} | {f.__name__: f for f in _OWN}
