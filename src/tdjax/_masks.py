"""Masks and means over valid steps. A call's mask is applied in `_steps/masked.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer, Num

from tdjax._checks import (
    at_least_float32,
    clipped_int32,
    describe,
    is_concrete,
    require_array,
)


def lengths_to_mask(
    lengths: Integer[Array | np.ndarray, " batch"],
    timesteps: Any,
    *,
    time_major: bool = False,
) -> Bool[Array, "..."]:
    """Marks the first `lengths[b]` of `timesteps` steps as valid.

    Args:
      lengths: `(batch,)`, integers from 0 to `timesteps`. Inside `jit`, where values
        can't be checked, lengths outside of this range are clipped to it.
      timesteps: the number of steps of the padded sequences.
      time_major: whether the mask is for time-major data, `(time, batch, ...)`.

    Returns:
      `(batch, timesteps)`, bool: `mask[b, t] = t < lengths[b]`; or `(timesteps, batch)`
      with `time_major=True`.

    Raises:
      TypeError: if `lengths` is not an array of integers, `timesteps` not an int, or
        `time_major` not a bool.
      ValueError: if `lengths` is not `(batch,)` or not from 0 to `timesteps`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> tdjax.lengths_to_mask(jnp.array([2, 0]), 3).tolist()
      [[True, True, False], [False, False, False]]
    """
    _check_timesteps(timesteps)
    if not isinstance(time_major, bool):
        raise TypeError(f"time_major must be a bool, got {describe(time_major)}.")
    require_array("lengths", lengths, 1, "(batch,)")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers, got {describe(lengths)}.")
    if lengths.ndim != 1:
        raise ValueError(f"lengths must have shape (batch,), got {describe(lengths)}.")
    if is_concrete(lengths):
        _check_range(np.asarray(lengths), timesteps)
    steps = jnp.arange(timesteps, dtype=jnp.int32)
    mask = steps[None, :] < clipped_int32(lengths, 0, 2**31 - 1)[:, None]
    return mask.T if time_major else mask


def masked_mean(
    values: Num[Array | np.ndarray, "..."],
    mask: Bool[Array | np.ndarray, "..."],
    axis: Any = None,
    axis_name: Any = None,
) -> Num[Array, "..."]:
    """The mean over the valid entries; 0, not NaN, where there are none.

    A masked entry affects neither the mean nor its gradient, even if it is NaN or
    infinite.

    Args:
      values: `(batch, time, ...)`, such as the loss of each step.
      mask: bool, True at the valid entries. Its shape is that of the leading axes of
        `values`, such as `(batch, time)`; the axes after these are not masked.
      axis: the axis or axes to average over, as in `jnp.mean`; all by default.
      axis_name: inside of a `jax.shard_map`, the mesh axis or axes to average over too:
        sums and counts of all devices are added. (A `jax.lax.pmean` of their means
        would be wrong where devices have different numbers of valid entries.)

    Returns:
      The mean, in the dtype that `jnp.mean` gives.

    Raises:
      TypeError, ValueError: if `mask` is not bool or does not fit `values`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> losses = jnp.array([[1.0, 3.0, jnp.nan], [jnp.inf, jnp.nan, 0.0]])
      >>> mask = tdjax.lengths_to_mask(jnp.array([2, 0]), 3)
      >>> tdjax.masked_mean(losses, mask, axis=1).tolist()
      [2.0, 0.0]
    """
    require_array("values", values, 0, "(batch, time, ...)")
    values = jnp.asarray(values)
    require_mask_dtype(mask)
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(
            "mask must have the shape of the leading axes of values, got "
            f"{describe(mask)} for values {describe(values)}."
        )
    valid = jnp.broadcast_to(over_trailing_axes(mask, values.ndim), values.shape)
    kept = jnp.where(valid, values, jnp.zeros((), values.dtype))
    count = jnp.sum(valid, axis=axis)
    is_inexact = jnp.issubdtype(values.dtype, jnp.inexact)
    dtype = values.dtype if is_inexact else jnp.result_type(float)
    wide = at_least_float32(dtype)
    total = jnp.sum(kept, axis=axis, dtype=wide)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return (total / jnp.maximum(count, 1).astype(wide)).astype(dtype)


def require_mask_dtype(mask: Any) -> None:
    """Refuses numbers, which may be meant as 0 and 1, as weights or as lengths."""
    require_array("mask", mask, 0, "(batch, time)")
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be bool, True at the valid steps, got {describe(mask)}. Write "
            "mask.astype(bool) if it holds 0 and 1, or tdjax.lengths_to_mask(lengths, "
            "timesteps) if it holds lengths."
        )


def over_trailing_axes(mask, rank: int):
    """`(batch, time)` -> `(batch, time, 1, ...)`."""
    return jnp.reshape(mask, (*mask.shape, *[1] * (rank - mask.ndim)))


def _check_timesteps(timesteps: Any) -> None:
    is_int = isinstance(timesteps, int | np.integer) and not isinstance(timesteps, bool)
    # A symbolic size of `jax.export` is allowed too.
    if not is_int and not hasattr(timesteps, "dimension_as_value"):
        raise TypeError(f"timesteps must be an int, got {describe(timesteps)}.")
    if is_int and timesteps < 0:
        raise ValueError(f"timesteps must be at least 0, got {timesteps}.")


def _check_range(lengths: np.ndarray, timesteps: Any) -> None:
    wrong = lengths < 0
    if isinstance(timesteps, int | np.integer):
        wrong |= lengths > timesteps
    if wrong.any():
        places = np.flatnonzero(wrong)
        raise ValueError(
            f"lengths must be from 0 to timesteps = {timesteps}, got "
            f"{lengths[wrong][0]} at index {places[0]} ({len(places)} of "
            f"{len(lengths)} are out of range)."
        )
