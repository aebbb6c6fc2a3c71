"""Keras' normalisations and noise as Flax modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Keras adds this to the number of unmasked positions before it divides by it.
EPSILON = 1e-7


class BatchNormalization(nn.Module):
    """Batch normalisation that can leave masked positions out of the statistics.

    Variables: those of `nn.BatchNorm`, which gives NaN where nothing is valid. Training
    is as inference if `frozen`.
    """

    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True
    frozen: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs, mask=None, train: bool = False):
        x = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        own = _Feature(self, x)
        mean = own.variable("mean", jnp.zeros)
        var = own.variable("var", jnp.ones)
        moments = own.read(mean.value), own.read(var.value)
        if train and not self.frozen:
            moments = _moments(x, own.others, mask)
            if not self.is_initializing():
                for statistic, new in zip((mean, var), moments):
                    statistic.value = self._move(statistic.value, new.reshape(-1))
        scale = own.param("scale", nn.initializers.ones) if self.use_scale else 1
        bias = own.param("bias", nn.initializers.zeros) if self.use_bias else 0
        factor = jax.lax.rsqrt(moments[1] + self.epsilon) * scale
        outputs = x * factor + (bias - moments[0] * factor)
        return outputs.astype(self.dtype or inputs.dtype)

    def _move(self, old, new):
        moved = old.astype(new.dtype) * self.momentum + new * (1 - self.momentum)
        return moved.astype(old.dtype)


class _Feature:
    """Variables with a value per feature of `x`, read so that they broadcast to it."""

    def __init__(self, module, x):
        axis = module.axis % x.ndim
        self.module, self.x = module, x
        self.others = tuple(i for i in range(x.ndim) if i != axis)
        self._size = (x.shape[axis],)

    def read(self, value):
        return jnp.expand_dims(value.astype(self.x.dtype), self.others)

    def param(self, name, init):
        dtype = self.module.param_dtype
        return self.read(self.module.param(name, init, self._size, dtype))

    def variable(self, name, init):
        dtype = self.module.param_dtype
        return self.module.variable("batch_stats", name, init, self._size, dtype)


def _moments(x, axes, mask):
    if mask is None:
        return jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    where = jnp.broadcast_to(mask[..., None], x.shape)
    count = jnp.sum(where, axes, keepdims=True, dtype=x.dtype) + EPSILON
    mean_of = lambda y: jnp.sum(jnp.where(where, y, 0), axes, keepdims=True) / count
    mean = mean_of(x)
    return mean, mean_of(jnp.square(jnp.where(where, x - mean, 0)))


class VarianceScaling(nn.Module):
    """Divides by the standard deviation without subtracting the mean."""

    epsilon: float
    feature_axes: tuple[int, ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        x = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        axes = [axis % x.ndim for axis in self.feature_axes]
        others = [axis for axis in range(x.ndim) if axis not in axes]
        sizes = [x.shape[axis] for axis in sorted(axes)]
        scale = self.param("scale", nn.initializers.ones, sizes, self.param_dtype)
        variance = jnp.var(x, tuple(axes), keepdims=True)
        factor = jax.lax.rsqrt(variance + self.epsilon)
        outputs = x * factor * jnp.expand_dims(scale.astype(x.dtype), others)
        return outputs.astype(self.dtype or inputs.dtype)


class Dropout(nn.Module):
    """`nn.Dropout` in training.

    `noise_shape` has 1 for axes that share their noise and None for the others, counted
    from the last axis; axes in front of them share it too.
    """

    rate: float
    noise_shape: tuple[int | None, ...] | None = None

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        shared = nn.Dropout(self.rate, self._shared_axes(inputs.ndim))
        return shared(inputs, deterministic=not train)

    def _shared_axes(self, rank: int) -> tuple[int, ...]:
        if self.noise_shape is None:
            return ()
        sizes = (1,) * (rank - len(self.noise_shape)) + self.noise_shape
        return tuple(axis for axis, size in enumerate(sizes) if size == 1)


class GaussianNoise(nn.Module):
    """Adds noise in training, from the stream `dropout`."""

    stddev: float

    def __call__(self, inputs, train: bool = False):
        if not train or not self.stddev:
            return inputs
        noise = jax.random.normal(self.make_rng("dropout"), inputs.shape, inputs.dtype)
        return inputs + self.stddev * noise
