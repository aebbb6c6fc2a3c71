"""Packed steps: only the valid ones are computed, as many as `capacity` allows.

The valid steps of all examples are gathered, in the order of the mask, into `capacity`
steps of a batch of one: `(batch, time, ...) -> (1, capacity, ...)`. Rows that are not
needed see a stand-in, as masked steps do (see `masked`). The results are scattered back
to their places; steps beyond the capacity are marked, so that no one takes them for
results.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tdjax._checks import is_concrete
from tdjax._masks import over_trailing_axes
from tdjax._steps.axes import (
    Axis,
    Inputs,
    batch_first,
    map_results,
    output_position,
    time_back,
)
from tdjax._steps.lowering import Lowering, call_and_check, check_out_axis, distribute
from tdjax._steps.masked import (
    batch_error,
    has_company,
    is_key,
    require_batch,
    stand_in,
    zeros_unless,
)
from tdjax._steps.steps import Steps


class PackedSteps(Steps):
    """Only the valid steps, as `capacity` steps of a batch of one."""

    def __init__(self, inputs: Inputs, mask, lowering: Lowering):
        self.mask = mask
        self.capacity: Any = lowering.capacity
        capacity = self.capacity
        flat = jnp.ravel(mask)
        self.size = flat.shape[0]
        places = jnp.nonzero(flat, size=capacity, fill_value=self.size)[0]
        self.weights = places < self.size
        # Unused rows read zeros and write nothing: each has a place beyond the end.
        self.places = jnp.where(self.weights, places, self.size + jnp.arange(capacity))
        self._is_seen = has_company(self.weights, lowering)
        self.inputs = inputs.replace(self._pack)

    def _pack(self, x, axis: Axis):
        """(batch, time, ...) -> (1, capacity, ...), in the order of the mask."""
        if not isinstance(axis, int):
            return x, axis
        if x.ndim == 1:
            x = jnp.broadcast_to(x, self.mask.shape)
            return self._gather(jnp.ravel(x)), 0
        x = batch_first(x, axis)
        return self._gather(jnp.reshape(x, (self.size, *x.shape[2:])))[None], 1

    def _gather(self, x):
        if 0 in self.mask.shape:
            return jnp.zeros((self.capacity, *x.shape[1:]), x.dtype)
        at = x.at[self.places]
        if is_key(x):
            return at.get(mode="clip")
        rows = at.get(
            mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
        )
        if x.ndim == 1 and x.dtype == jnp.bool_:
            return rows | ~self._is_seen
        used = over_trailing_axes(self.weights, rows.ndim)
        return jnp.where(used, rows, stand_in(rows[:1], self.weights[0]))

    def run(self, call, out_axes, lowering: Lowering):
        # Time stays next to the batch until the results are unpacked, so that no block
        # is transposed. The errors still speak of the caller's axes.
        call = functools.partial(call_and_check, call, _check_result, out_axes)
        is_none = lambda node: node is None
        packed_axes = jax.tree.map(_packed_axis, out_axes, is_leaf=is_none)
        results = distribute(call, self.inputs, packed_axes, lowering)
        return map_results(self._unpack, results, out_axes)

    def hide(self, results, out_axes):
        packed = map_results(_time_next_to_batch, results, out_axes)
        return map_results(self._unpack, packed, out_axes)

    def _unpack(self, y, axis: Axis):
        """(1, capacity, ...) -> (batch, time, ...), zeros at masked steps."""
        if not isinstance(axis, int):
            return y
        require_batch("capacity", y, 1, 1)
        rows = jnp.zeros((self.size, *y.shape[2:]), y.dtype)
        if not self._fits():
            rows = self._mark_steps_beyond_capacity(rows, y[0, :1])
        rows = rows.at[self.places].set(
            y[0], mode="drop", unique_indices=True, indices_are_sorted=True
        )
        y = jnp.reshape(rows, (*self.mask.shape, *y.shape[2:]))
        return time_back(y, output_position(axis, y.ndim))

    def _fits(self) -> bool:
        """Whether it is known, before the program runs, that no step is left out."""
        known = isinstance(self.size, int) and self.size <= self.capacity
        return known or is_concrete(self.mask)

    def _mark_steps_beyond_capacity(self, rows, a_result):
        flat = jnp.ravel(self.mask)
        count = jnp.cumsum(flat)
        beyond = over_trailing_axes(flat & (count > self.capacity), rows.ndim)
        mark = _not_computed(rows.dtype)
        if jnp.issubdtype(rows.dtype, jnp.inexact):
            # Times a result, the mark makes the gradient NaN as well.
            zero = jnp.zeros((), rows.dtype)
            mark = jnp.where(count[-1] > self.capacity, mark, zero) * a_result
        return jnp.where(beyond, mark, rows)

    def hide_sown(self, sown):
        """Zeros in the rows that are not used."""
        return zeros_unless(self.weights, sown)


def _packed_axis(axis: Axis) -> Axis:
    return 1 if isinstance(axis, int) else axis


def _time_next_to_batch(y, axis: Axis):
    if not isinstance(axis, int):
        return y
    return batch_first(y, output_position(axis, y.ndim))


def _check_result(y, axis: Axis) -> None:
    """Refuses what can't be unpacked."""
    if isinstance(axis, int):
        if jnp.ndim(y) < 1:
            raise batch_error("capacity", jnp.asarray(y))
        check_out_axis(y, axis)


def _not_computed(dtype):
    """The mark: NaN; the lowest signed or the highest unsigned integer."""
    if jnp.issubdtype(dtype, jnp.inexact) and np.isnan(np.array(np.nan, dtype)):
        return jnp.asarray(jnp.nan, dtype)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"capacity marks the steps beyond it, which a {dtype} result can't show "
            "when the mask is only known at run time. Return another dtype."
        )
    limits = jnp.iinfo(dtype)
    return jnp.asarray(limits.min or limits.max, dtype)
