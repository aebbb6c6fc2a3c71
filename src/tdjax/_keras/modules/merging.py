"""Keras' layers that merge inputs, as Flax modules."""

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp


class _Merge(nn.Module):
    """Combines inputs one after the other; the mask is valid where one of them is."""

    combine: ClassVar[Callable]

    def __call__(self, inputs):
        return functools.reduce(self.combine, _same_rank(inputs))

    def compute_mask(self, inputs, mask) -> Any:
        masks = mask or [None]
        if any(m is None for m in masks):
            return None
        return functools.reduce(operator.or_, masks)


def _same_rank(inputs):
    """Axes of size 1 after the batch, where an input has fewer axes than others."""
    rank = max(x.ndim for x in inputs)
    return [jnp.expand_dims(x, tuple(range(1, 1 + rank - x.ndim))) for x in inputs]


def _with_masks(inputs, mask):
    """The inputs and masks that broadcast to them; a new axis ends a mask."""
    same = _same_rank(inputs)
    pairs = zip(inputs, same, mask or [None] * len(inputs))
    keeps = lambda x, y, m: None if m is None or x.ndim < y.ndim else m[..., None]
    return same, [keeps(*pair) for pair in pairs]


class Add(_Merge):
    """The sum of the inputs."""

    combine = staticmethod(operator.add)


class Subtract(_Merge):
    """The first input less the second."""

    combine = staticmethod(operator.sub)


class Multiply(_Merge):
    """The product of the inputs' unmasked values; zero where all are masked."""

    def __call__(self, inputs, mask=None):
        inputs, masks = _with_masks(inputs, mask)
        kept = [x if m is None else jnp.where(m, x, 1) for x, m in zip(inputs, masks)]
        outputs = functools.reduce(operator.mul, kept)
        valid = [m for m in masks if m is not None]
        if len(valid) < len(masks):
            return outputs
        return jnp.where(functools.reduce(operator.or_, valid), outputs, 0)


class Average(Add):
    """The mean of the inputs."""

    def __call__(self, inputs):
        return super().__call__(inputs) / len(inputs)


class _Extremum(_Merge):
    """A masked value gives way to the other input's."""

    def __call__(self, inputs, mask=None):
        (outputs, *rest), (known, *masks) = _with_masks(inputs, mask)
        for x, valid in zip(rest, masks):
            x = x if valid is None else jnp.where(valid, x, outputs)
            outputs = outputs if known is None else jnp.where(known, outputs, x)
            known = None if known is None or valid is None else known | valid
            outputs = self.combine(outputs, x)
        return outputs


class Maximum(_Extremum):
    """The largest of the inputs."""

    combine = staticmethod(jnp.maximum)


class Minimum(_Extremum):
    """The smallest of the inputs."""

    combine = staticmethod(jnp.minimum)


class Concatenate(_Merge):
    """The inputs one after the other along an axis."""

    axis: int = -1

    def __call__(self, inputs):
        return jnp.concatenate(inputs, self.axis)

    def compute_mask(self, inputs, mask):
        if mask is None or all(m is None for m in mask):
            return None
        masks = [_full_mask(x, m) for x, m in zip(inputs, mask)]
        return jnp.any(jnp.concatenate(masks, self.axis), axis=-1)


def _full_mask(x, mask):
    if mask is None:
        return jnp.ones(x.shape, bool)
    return jnp.broadcast_to(mask[..., None], x.shape) if mask.ndim < x.ndim else mask


class Dot(nn.Module):
    """The product of two inputs, summed over one axis of each."""

    axes: tuple[int, int]
    normalize: bool = False

    def __call__(self, inputs):
        axes = [axis % x.ndim for axis, x in zip(self.axes, inputs)]
        if self.normalize:
            inputs = [_unit(x, axis) for x, axis in zip(inputs, axes)]
        (x, y), (i, j) = inputs, axes
        outputs = jax.lax.dot_general(x, y, (((i,), (j,)), ((0,), (0,))))
        return outputs[:, None] if outputs.ndim == 1 else outputs

    def compute_mask(self, inputs, mask):
        return None


def _unit(x, axis):
    square_sum = jnp.sum(jnp.square(x), axis, keepdims=True)
    return x * jnp.minimum(jax.lax.rsqrt(square_sum), 1e7)
