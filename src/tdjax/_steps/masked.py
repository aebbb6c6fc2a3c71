"""Steps of which some are masked: computed and hidden, or left out by packing.

Both keep two promises. Results at masked steps are zeros, and no gradient flows from or
to them. And `fun` never sees the numbers of a masked step: it sees those of a valid one
in their place, where it is finite if it is finite at all. Zeros would not do: the
gradient of a norm is NaN at zero, and NaN times the zero gradient of a hidden result is
NaN. Random keys stay what they are, and bools of `(batch, time)`, which are masks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tdjax._checks import describe, is_concrete
from tdjax._masks import over_trailing_axes, require_mask_dtype
from tdjax._steps.axes import Axis, Inputs, broadcast_axes, output_position, time_size
from tdjax._steps.lowering import Lowering, check_out_axis, distribute

EACH_ITS_OWN: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}


class AllSteps:
    """Without a mask."""

    weights = None

    def __init__(self, inputs: Inputs):
        self.inputs = inputs

    def run(self, call, out_axes, lowering: Lowering):
        return distribute(call, self.inputs, out_axes, lowering)

    def hide(self, results, out_axes):
        return results

    def hide_sown(self, sown):
        return sown


class MaskedSteps:
    """All steps are computed, and masked ones hidden on both sides."""

    def __init__(self, inputs: Inputs, mask):
        self.mask = mask
        self.weights = jnp.any(mask, axis=0)
        self.inputs = inputs if 0 in mask.shape else _replace(inputs, self._guard)

    def _guard(self, x, axis: Axis):
        if not isinstance(axis, int) or _is_kept(x):
            return x, axis
        if x.ndim == 1:
            stand_in = _stand_in(x[self._times()], jnp.any(self.mask))
            return jnp.where(self.weights, x, stand_in), axis
        steps = _batch_first(x, axis)
        valid = over_trailing_axes(self.mask, steps.ndim)
        return _time_back(jnp.where(valid, steps, self._stand_ins(steps)), axis), axis

    def _times(self):
        """For each step: itself, or the first that has a valid example."""
        times = jnp.arange(self.mask.shape[1])
        return jnp.where(self.weights, times, jnp.argmax(self.weights))

    def _stand_ins(self, steps):
        """(time, ...): the first valid example of each step, or of `_times`.

        By a sum, for which devices that share the batch exchange one example only.
        """
        examples = jnp.arange(self.mask.shape[0])[:, None]
        first = self.mask & (examples == jnp.argmax(self.mask, axis=0))
        chosen = jnp.where(over_trailing_axes(first, steps.ndim), steps, _zero(steps))
        found = jnp.sum(jax.lax.stop_gradient(chosen), 0, dtype=steps.dtype)
        return _stand_in(found[self._times()], jnp.any(self.mask))

    def run(self, call, out_axes, lowering: Lowering):
        return self.hide(distribute(call, self.inputs, out_axes, lowering), out_axes)

    def hide(self, results, out_axes):
        """Zeros at masked steps, in results that have a time axis of their own."""
        return _map_timed(self._hide, results, out_axes)

    def _hide(self, y, axis: int):
        axis = output_position(axis, y.ndim)
        _require_batch("mask", y, axis, self.mask.shape[0])
        y = _batch_first(y, axis)
        y = jnp.where(over_trailing_axes(self.mask, y.ndim), y, _zero(y))
        return _time_back(y, axis)

    def hide_sown(self, sown):
        """Zeros where no example is valid, and at masked examples."""
        by_example = sown.shape[1:2] == self.mask.shape[:1]
        valid = jnp.transpose(self.mask) if by_example else self.weights
        return jnp.where(over_trailing_axes(valid, sown.ndim), sown, _zero(sown))


class PackedSteps:
    """Only the valid steps are computed: as `capacity` steps of a batch of one."""

    def __init__(self, inputs: Inputs, mask, capacity: int):
        self.mask, self.capacity = mask, capacity
        flat = jnp.ravel(mask)
        self.size = flat.shape[0]
        found = jnp.nonzero(flat, size=capacity, fill_value=self.size)[0]
        self.used = self.weights = found < self.size
        # Beyond the end and each its own: unused rows read zeros and write nothing.
        self.rows = jnp.where(self.used, found, self.size + jnp.arange(capacity))
        self.inputs = _replace(inputs, self._pack)

    def _pack(self, x, axis: Axis):
        """(batch, time, ...) -> (1, capacity, ...), the order that of the mask."""
        if not isinstance(axis, int):
            return x, axis
        if x.ndim == 1:
            x = jnp.broadcast_to(x, self.mask.shape)
            return self._gather(jnp.ravel(x)), 0
        x = _batch_first(x, axis)
        return self._gather(jnp.reshape(x, (-1, *x.shape[2:])))[None], 1

    def _gather(self, x):
        if 0 in self.mask.shape:
            return jnp.zeros((self.capacity, *x.shape[1:]), x.dtype)
        at = x.at[self.rows]
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return at.get(mode="clip")
        rows = at.get(mode="fill", fill_value=0, **EACH_ITS_OWN)
        if x.ndim == 1 and x.dtype == jnp.bool_:
            return rows
        used = over_trailing_axes(self.used, rows.ndim)
        return jnp.where(used, rows, _stand_in(rows[:1], self.used[0]))

    def run(self, call, out_axes, lowering: Lowering):
        packed_axes = jax.tree.map(
            lambda axis: 1 if isinstance(axis, int) else axis,
            out_axes,
            is_leaf=lambda node: node is None,
        )
        call = functools.partial(_call_and_check, call, out_axes)
        results = distribute(call, self.inputs, packed_axes, lowering)
        return _map_timed(self._unpack, results, out_axes)

    def _unpack(self, y, axis: int):
        """(1, capacity, ...) -> (batch, time, ...), zeros at masked steps."""
        _require_batch("capacity", y, 1, 1)
        rows = jnp.zeros((self.size, *y.shape[2:]), y.dtype)
        if not self._fits():
            rows = self._mark_what_did_not_fit(rows, y[0, :1])
        rows = rows.at[self.rows].set(y[0], mode="drop", **EACH_ITS_OWN)
        y = jnp.reshape(rows, (*self.mask.shape, *y.shape[2:]))
        return _time_back(y, output_position(axis, y.ndim))

    def _fits(self) -> bool:
        """Whether it is sure, before the program runs, that no step is left out."""
        known = isinstance(self.size, int) and self.size <= self.capacity
        return known or is_concrete(self.mask)

    def _mark_what_did_not_fit(self, rows, a_result):
        flat = jnp.ravel(self.mask)
        count = jnp.cumsum(flat)
        left_out = over_trailing_axes(flat & (count > self.capacity), rows.ndim)
        mark = _not_computed(rows.dtype)
        if jnp.issubdtype(rows.dtype, jnp.inexact):
            # Made of a result, it makes the gradient NaN as well.
            mark = jnp.where(count[-1] > self.capacity, mark, _zero(rows)) * a_result
        return jnp.where(left_out, mark, rows)

    def hide_sown(self, sown):
        """Zeros in the rows that are not used."""
        return jnp.where(over_trailing_axes(self.used, sown.ndim), sown, _zero(sown))


def select_steps(inputs: Inputs, mask, lowering: Lowering):
    """The steps to compute, once it is sure that the mask fits them."""
    capacity = lowering.capacity
    if mask is None:
        if capacity is not None:
            raise ValueError(
                f"capacity={capacity} needs a mask that says which steps are valid: "
                "call with mask=, bool, (batch, time)."
            )
        return AllSteps(inputs)
    _check_mask(mask, inputs)
    if is_concrete(mask):
        mask = np.asarray(mask)
    if capacity is None:
        return MaskedSteps(inputs, mask)
    _check_capacity(mask, capacity)
    return PackedSteps(inputs, mask, capacity)


def _replace(inputs: Inputs, change) -> Inputs:
    pairs = [change(x, axis) for x, axis in zip(inputs.leaves, inputs.axes)]
    leaves, axes = zip(*pairs)
    return Inputs([*leaves], [*axes], inputs.treedef)


def _batch_first(x, axis: int):
    """(batch, time, ...): of what `fun` sees, the batch is axis 0."""
    return jnp.moveaxis(x, axis, 1)


def _time_back(x, axis: int):
    return jnp.moveaxis(x, 1, axis)


def _is_kept(x) -> bool:
    """Random keys have no zero; bools of (batch, time) are masks."""
    is_mask = x.dtype == jnp.bool_ and x.ndim <= 2
    return is_mask or jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _zero(x):
    return jnp.zeros((), x.dtype)


def _stand_in(valid_step, exists):
    """What `fun` sees in place of masked steps; no gradient is taken of it.

    Ones, where there is no valid step: they have a logarithm and a norm to divide by.
    """
    is_float = jnp.issubdtype(valid_step.dtype, jnp.inexact)
    other = jnp.asarray(1 if is_float else 0, valid_step.dtype)
    return jax.lax.stop_gradient(jnp.where(exists, valid_step, other))


def _map_timed(fun, results, out_axes):
    """Maps `fun(leaf, axis)` over the results that have a time axis of their own."""
    axes = broadcast_axes("out_axes", out_axes, results, "the results")
    leaves, treedef = jax.tree.flatten(results)
    changed = [
        fun(jnp.asarray(y), axis) if isinstance(axis, int) else y
        for y, axis in zip(leaves, axes)
    ]
    return jax.tree.unflatten(treedef, changed)


def _call_and_check(call, out_axes, mapped):
    """Refuses what can't be unpacked, in terms of the user's own axes."""
    return _map_timed(_require_result_batch, call(mapped), out_axes)


def _require_result_batch(y, axis: int):
    if y.ndim < 1:
        raise ValueError(_batch_message("capacity", y))
    check_out_axis(y, axis)
    return y


def _require_batch(name: str, y, time_axis: int, batch: Any) -> None:
    """`y` has time on `time_axis`, and must have the batch on axis 0 without it."""
    if y.ndim < 2 or y.shape[1 if time_axis == 0 else 0] != batch:
        step = jax.ShapeDtypeStruct(np.delete(y.shape, time_axis), y.dtype)
        raise ValueError(_batch_message(name, step))


def _batch_message(name: str, step) -> str:
    return (
        f"{name} needs results with the batch on axis 0 of what fun returns for a "
        f"step, got {describe(step)}. Reduce over the batch outside of fun; give an "
        "argument that has a batch a time axis too (jnp.broadcast_to), so that it is "
        "not shared; declare results that no step changes with None in out_axes."
    )


def _not_computed(dtype):
    """What no layer would give: NaN; for integers, the lowest, or the highest."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    if dtype == jnp.bool_:
        raise TypeError(
            "capacity marks the steps for which there was no room, which a bool result "
            "can't show when the mask is only known at run time. Return an integer."
        )
    limits = jnp.iinfo(dtype)
    return jnp.asarray(limits.min or limits.max, dtype)


def _check_mask(mask: Any, inputs: Inputs) -> None:
    require_mask_dtype(mask)
    if mask.ndim != 2:
        raise ValueError(
            f"mask must have shape (batch, time), got {describe(mask)}. Give a mask "
            "that is for fun itself as a positional argument."
        )
    timesteps = time_size(inputs)
    for x, axis in zip(inputs.mapped, inputs.mapped_axes):
        if not isinstance(axis, int):
            continue
        batch = mask.shape[0] if x.ndim == 1 else x.shape[1 if axis == 0 else 0]
        if mask.shape != (batch, timesteps):
            raise ValueError(
                f"mask must have shape (batch, time) = {(batch, timesteps)} to go "
                f"with an input {describe(x)} with time on axis {axis}, got "
                f"{describe(mask)}."
            )


def _check_capacity(mask, capacity: int) -> None:
    if not is_concrete(mask):
        return
    valid = int(np.sum(mask))
    if valid > capacity:
        raise ValueError(
            f"capacity={capacity} must be at least the number of valid steps, got a "
            f"mask with {valid}."
        )
