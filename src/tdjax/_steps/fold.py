"""`method="fold"`: batch and time merged into one axis, and `fun` called once.

A block of steps goes in, each array with its time axis in place. `_merge_time` gives
`fun` arrays of `(batch * time, ...)`, and `_split_time` undoes this for its results.
`fun` must return one row per example; `check_shapes` compares with the shapes of one
step, because a function that mixes the batch may still return the right number of rows.
"""

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe
from tdjax._steps.axes import (
    PER_STEP,
    PER_STEP_OR_BATCH,
    Axis,
    Inputs,
    PerStep,
    batch_size,
    first_step,
    map_results,
    output_position,
    position,
    time_size,
)
from tdjax._steps.effect import in_effect

# Is told what the next block folds: `watch(call, folded, axes, out_axes, batch)`.
_watcher: contextvars.ContextVar[Callable[..., None] | None] = contextvars.ContextVar(
    "watcher", default=None
)


@contextlib.contextmanager
def watch_fold(watch: Callable[..., None] | None):
    """Shows the first function that is folded in here to `watch`; None for nobody."""
    token = _watcher.set(watch)
    try:
        yield
    finally:
        _watcher.reset(token)


def fold_block(call, axes, out_axes):
    """A function of one block of steps, which calls `call` once."""
    time_major = next((axis == 0 for axis in axes if axis is not PER_STEP), False)

    def block(mapped):
        batch, timesteps = _sizes(mapped, axes)
        folded = [_merge_time(x, axis, time_major) for x, axis in zip(mapped, axes)]
        watch = _watcher.get()
        if watch is not None:
            _watcher.set(None)  # A fold inside of `call` is its own business.
            watch(call, folded, axes, out_axes, batch)
        y = _call_folded(call, folded, batch, timesteps)
        split = functools.partial(_split_time, batch, timesteps, time_major)
        return map_results(split, y, out_axes)

    return block


def _sizes(mapped, axes) -> tuple[Any, Any]:
    """`(batch, timesteps)`, the same for every array that has both."""
    arrays = [(x, axis) for x, axis in zip(mapped, axes) if axis is not PER_STEP]
    for x, axis in arrays:
        if x.ndim < 2:
            raise ValueError(
                "method='fold' needs a batch axis beside the time axis of every mapped "
                f"array, got {describe(x)} with time on axis {axis}. Use method='vmap'."
            )
    batches = {batch_size(x, axis) for x, axis in arrays}
    if len(batches) > 1:
        shapes = "; ".join(f"{describe(x)} with time on axis {a}" for x, a in arrays)
        raise ValueError(
            "method='fold' needs one batch size in every mapped array (axis 0 without "
            f"the time axis), got {shapes}. Use method='vmap'."
        )
    x, axis = arrays[0]
    return batches.pop(), x.shape[axis]


def _merge_time(x, axis: Axis, time_major: bool):
    """(batch, time, ...) -> (batch * time, ...), or (time * batch, ...)."""
    if axis is PER_STEP:
        return first_step(x, axis)
    # Next to each other and in this order, the two axes merge without a copy.
    x = jnp.moveaxis(x, position(axis), 0 if time_major else 1)
    return jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def _split_time(batch, timesteps, time_major: bool, y, axis: Axis):
    """The inverse of `_merge_time` for one result."""
    if axis is PER_STEP_OR_BATCH and jnp.shape(y)[:1] == (batch * timesteps,):
        axis = 0
    if isinstance(axis, PerStep):
        return jnp.broadcast_to(y, (timesteps, *jnp.shape(y)))
    if axis is None:
        return y
    if jnp.ndim(y) < 1 or y.shape[0] != batch * timesteps:
        raise ValueError(
            "method='fold' needs results with the batch on axis 0: fun was given "
            f"batch * time = {batch} * {timesteps} = {batch * timesteps} examples and "
            f"returned {describe(y)}. Use method='vmap'."
        )
    leading = (timesteps, batch) if time_major else (batch, timesteps)
    y = jnp.reshape(y, (*leading, *y.shape[1:]))
    return jnp.moveaxis(y, 0 if time_major else 1, output_position(axis, y.ndim))


def _call_folded(call, folded, batch, timesteps):
    try:
        return call(folded)
    except (TypeError, ValueError) as error:
        error.add_note(
            "This was raised with method='fold', where fun sees batch * time = "
            f"{batch} * {timesteps} examples, but what all steps share (None in "
            "in_axes, and keyword arguments) as it is. If a shared argument has a "
            "batch axis, repeat it over time and map it, or use method='vmap'."
        )
        raise


def check_shapes(call, inputs: Inputs, out_axes, results) -> None:
    """Compares with one step's shapes, which must not depend on the batch size.

    Only a second call of `fun` can tell, with another batch size.
    """
    step = lambda mapped: call([*map(first_step, mapped, inputs.mapped_axes)])
    with_time = functools.partial(_with_time, time_size(inputs))
    shapes = shapes_of(step, inputs.mapped)
    if shapes is None:
        return
    wanted = map_results(with_time, shapes, out_axes)
    drop_state = lambda y, axis: None if isinstance(axis, PerStep) else jnp.asarray(y)
    got = map_results(drop_state, results, out_axes)
    for want, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got)):
        if y.shape != want.shape:
            raise ValueError(
                "method='fold' needs results of the shape that the steps stacked have, "
                f"{describe(want)}: fun was given all examples of all steps at once, "
                f"and returned {describe(y)}. Use method='vmap'."
            )


def shapes_of(fun, mapped) -> Any:
    """`jax.eval_shape`; in a Haiku transform, without keeping what `fun` makes there.

    None if that can't be done: `fun` reads parameters or state from outside of it.
    """
    # A fold inside of `fun` is not the one that is watched, and nothing is tuned for
    # shapes that never run.
    with watch_fold(None), in_effect(None):
        return _shapes_of(fun, mapped)


def _shapes_of(fun, mapped) -> Any:
    if not in_haiku_transform():
        return jax.eval_shape(fun, mapped)
    haiku: Any = sys.modules["haiku"]
    net = haiku.transform_with_state(fun)

    def run(key, mapped):
        return net.apply(*net.init(key, mapped), key, mapped)[0]

    try:
        return jax.eval_shape(run, jax.random.PRNGKey(0), mapped)
    except Exception:
        return None  # Haiku's own errors come from the call itself.


def in_haiku_transform() -> bool:
    """Whether a call makes parameters and keys, as Haiku's modules do."""
    # Known by its name: Haiku is not imported here.
    haiku: Any = sys.modules.get("haiku")
    if not hasattr(haiku, "running_init"):
        return False
    try:
        haiku.running_init()
    except ValueError:
        return False
    return True


def _with_time(timesteps, y, axis: Axis):
    """The shape of one step's result, with time; None for a layer's state."""
    if isinstance(axis, PerStep):
        return None
    shape = list(y.shape)
    if axis is not None:
        shape.insert(output_position(axis, y.ndim + 1), timesteps)
    return jax.ShapeDtypeStruct(shape, y.dtype)
