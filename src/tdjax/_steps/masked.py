"""Masked steps: all are computed, and the masked ones hidden on both sides.

Two promises hold, here and in `packed`. Results at masked steps are zeros, and no
gradient flows from or to them. And `fun` never sees the numbers of a masked step. In
their place it sees a *stand-in*, the numbers of a valid step, which `fun` was made for.
Zeros would not do: the gradient of a norm is NaN at zero, and NaN times the zero
gradient of a hidden result is NaN. Random keys are left as they are, and so are bools
of `(batch, time)`, which are masks themselves: but where `fun` sees no valid step at
all they are True, for a mean over nothing has a NaN gradient too.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe
from tdjax._masks import over_trailing_axes
from tdjax._steps.axes import (
    Axis,
    Inputs,
    batch_first,
    batch_size,
    map_results,
    output_position,
    step_shape,
    time_back,
)
from tdjax._steps.lowering import Lowering, distribute
from tdjax._steps.steps import Steps


class MaskedSteps(Steps):
    """All steps, with stand-ins in the masked ones and zeros in their results."""

    def __init__(self, inputs: Inputs, mask, lowering: Lowering):
        self.mask = mask
        self.weights = jnp.any(mask, axis=0)
        self._is_seen = has_company(self.weights, lowering)
        self.inputs = inputs if 0 in mask.shape else inputs.replace(self._guard)

    def _guard(self, x, axis: Axis):
        """Puts stand-ins into the masked steps of one input."""
        if not isinstance(axis, int) or is_key(x):
            return x, axis
        if x.dtype == jnp.bool_ and x.ndim <= 2:
            is_time_last = axis % x.ndim == x.ndim - 1
            seen = self._is_seen if is_time_last else self._is_seen[:, None]
            return x | ~seen, axis
        if x.ndim == 1:
            other = stand_in(x[self._valid_times()], jnp.any(self.mask))
            return jnp.where(self.weights, x, other), axis
        steps = batch_first(x, axis)
        valid = over_trailing_axes(self.mask, steps.ndim)
        others = self._stand_ins(steps)[None]
        return time_back(jnp.where(valid, steps, others), axis), axis

    def _valid_times(self):
        """For each step: itself, or the first that has a valid example."""
        times = jnp.arange(self.mask.shape[1])
        return jnp.where(self.weights, times, jnp.argmax(self.weights))

    def _stand_ins(self, steps):
        """(time, ...): the first valid example of each step, or of `_valid_times`.

        By a sum: devices that share the batch then exchange only one example.
        """
        examples = jnp.arange(self.mask.shape[0])[:, None]
        first = self.mask & (examples == jnp.argmax(self.mask, axis=0, keepdims=True))
        chosen = zeros_unless(first, steps)
        valid = jnp.sum(jax.lax.stop_gradient(chosen), 0, dtype=steps.dtype)
        return stand_in(valid[self._valid_times()], jnp.any(self.mask))

    def run(self, call, out_axes, lowering: Lowering):
        return self.hide(distribute(call, self.inputs, out_axes, lowering), out_axes)

    def hide(self, results, out_axes):
        return map_results(self._hide, results, out_axes)

    def _hide(self, y, axis: Axis):
        if not isinstance(axis, int):
            return y
        axis = output_position(axis, y.ndim)
        require_batch("mask", y, axis, self.mask.shape[0])
        return time_back(zeros_unless(self.mask, batch_first(y, axis)), axis)

    def hide_sown(self, sown):
        """Zeros at masked examples; without a batch, where no example is valid."""
        has_batch = sown.shape[1:2] == self.mask.shape[:1]
        return zeros_unless(
            jnp.transpose(self.mask) if has_batch else self.weights, sown
        )


def is_key(x) -> bool:
    """Whether it is an array of random keys, which have no zero."""
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def has_company(valid, lowering: Lowering):
    """For each step, whether the call of `fun` that computes it has a valid step.

    `valid` is bool, `(steps,)`. Under `"vmap"` each step has a call of its own, under
    `"fold"` each block.
    """
    if lowering.method != "fold" or lowering.chunk_size == 1:
        return valid
    if lowering.chunk_size is None:
        return jnp.broadcast_to(jnp.any(valid), valid.shape)
    block = jnp.arange(valid.shape[0]) // lowering.chunk_size
    return jnp.zeros_like(valid).at[block].max(valid)[block]


def stand_in(valid_step, exists):
    """What `fun` sees in place of masked steps; no gradient is taken of it.

    Ones, where there is no valid step: they have a logarithm and a norm to divide by.
    """
    is_float = jnp.issubdtype(valid_step.dtype, jnp.inexact)
    other = jnp.asarray(1 if is_float else 0, valid_step.dtype)
    return jax.lax.stop_gradient(jnp.where(exists, valid_step, other))


def zeros_unless(valid, x):
    """`x` where `valid`, a mask of its leading axes, is True."""
    return jnp.where(over_trailing_axes(valid, x.ndim), x, jnp.zeros((), x.dtype))


def require_batch(option: str, y, time_axis: int, batch: Any) -> None:
    """Refuses a result that has no such batch beside its time axis."""
    require_values(option, "fun must not return", y)
    if y.ndim < 2 or batch_size(y, time_axis) != batch:
        raise batch_error(option, step_shape(y, time_axis))


def require_values(option: str, complaint: str, x) -> None:
    """Refuses float0, JAX's gradient by integers: it has no values to hide."""
    if x.dtype == jax.dtypes.float0:
        raise TypeError(
            f"{option} hides numbers, so {complaint} {describe(x)}, the gradient by "
            "integers, which has none. Leave it out."
        )


def batch_error(option: str, step) -> ValueError:
    return ValueError(
        f"{option} needs results with the batch on axis 0 of what fun returns for a "
        f"step, got {describe(step)}. Reduce over the batch outside of fun; give an "
        "argument that has a batch a time axis too (jnp.broadcast_to), so that it is "
        "not shared; declare results that no step changes with None in out_axes."
    )
