"""How a block of steps is compiled, and how blocks follow each other."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tdjax._checks import describe, is_array, require_positive_int
from tdjax._steps.axes import (
    PER_STEP,
    PER_STEP_OR_BATCH,
    Axis,
    Inputs,
    PerStep,
    blocks_first,
    broadcast_axes,
    concatenate_blocks,
    first_step,
    join_blocks,
    output_position,
    position,
    slice_steps,
    time_size,
)
from tdjax._steps.cpu_convolution import with_transposed_convolutions

METHODS = ("vmap", "fold")


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How `y[:, t] = fun(x[:, t])` is compiled; the fields are `time_distributed`'s."""

    method: Literal["vmap", "fold"] = "vmap"
    chunk_size: int | None = None
    unroll: int | bool = 1
    remat: bool = False
    axis_name: Any = None
    spmd_axis_name: Any = None
    capacity: int | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}.")
        for name in ("chunk_size", "capacity"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        if not isinstance(self.unroll, bool):
            require_positive_int("unroll", self.unroll)
        if not isinstance(self.remat, bool):
            raise TypeError(f"remat must be a bool, got {describe(self.remat)}.")
        self._check_names()

    def _check_names(self):
        if self.axis_name is not None and self.chunk_size is not None:
            raise ValueError(
                f"axis_name={self.axis_name!r} lets fun see all steps at once; "
                f"chunk_size={self.chunk_size} must then be None."
            )
        for name in ("axis_name", "spmd_axis_name"):
            if self.method != "vmap" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} names the axis that vmap maps "
                    f"over; it needs method='vmap', got method={self.method!r}."
                )
            if self.capacity is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} names the time axis, which "
                    f"capacity={self.capacity} replaces by the valid steps of all "
                    "examples; give one of them only."
                )


def distribute(call, inputs: Inputs, out_axes: Any, lowering: Lowering) -> Any:
    """Runs `call`, a function of the leaves that have a time axis, over all steps."""
    lower = {"vmap": _vmap_block, "fold": _fold_block}[lowering.method]
    axes, timesteps = inputs.mapped_axes, time_size(inputs)
    call = functools.partial(_call_and_check, call, out_axes)
    if lowering.method == "fold" or lowering.chunk_size is not None:
        _check_shared_results(call, inputs, out_axes)
    chunk = lowering.chunk_size
    # A symbolic size can't be compared; the loop below handles it as it comes.
    if chunk is None or (isinstance(timesteps, int) and timesteps <= chunk):
        block = lower(call, axes, out_axes, lowering)
        y = _maybe_remat(block, lowering.remat)(inputs.mapped)
    else:
        make = lower if chunk > 1 else _step_block
        make = functools.partial(make, axes=axes, out_axes=out_axes, lowering=lowering)
        y = _loop(make, call, inputs, out_axes, timesteps, lowering)
    if lowering.method == "fold":
        _check_fold_shapes(call, inputs, out_axes, y)
    return y


def _loop(make_block, call, inputs: Inputs, out_axes, timesteps, lowering: Lowering):
    if lowering.unroll is True or lowering.unroll > 1:
        _require_known_size(timesteps, lowering.unroll)
    if lowering.unroll is True:
        return _straight_line(make_block(call), inputs, out_axes, timesteps, lowering)
    if jax.default_backend() == "cpu":
        call = with_transposed_convolutions(call)
    return _compiled_loop(make_block(call), inputs, out_axes, timesteps, lowering)


def _call_and_check(call, out_axes, mapped):
    """Refuses `out_axes` that the results of one step can't have."""
    y = call(mapped)
    _map_results(check_out_axis, y, out_axes)
    return y


def check_out_axis(y, axis: Axis) -> None:
    """Refuses an axis that the results of one step can't be stacked on."""
    if not is_array(y) and not isinstance(y, bool | int | float | complex):
        raise TypeError(f"fun must return arrays, got {describe(y)}.")
    rank = jnp.ndim(y) + 1
    if isinstance(axis, int) and not -rank <= axis < rank:
        raise ValueError(
            f"out_axes must lie within the result's {rank} axes (time included), got "
            f"{axis} for a step's result {describe(jnp.asarray(y))}."
        )


def _vmap_block(call, axes, out_axes, lowering: Lowering):
    return jax.vmap(
        call,
        in_axes=([position(axis) for axis in axes],),
        out_axes=_as_vmap_axes(out_axes),
        axis_name=lowering.axis_name,
        spmd_axis_name=lowering.spmd_axis_name,
    )


def _as_vmap_axes(out_axes):
    swap = lambda axis: 0 if isinstance(axis, PerStep) else axis
    return jax.tree.map(swap, out_axes, is_leaf=lambda node: node is None)


def _step_block(call, axes, out_axes, lowering: Lowering):
    """A block of one step: index it, call, and put the axis back."""

    def block(mapped):
        steps = [jnp.squeeze(x, position(axis)) for x, axis in zip(mapped, axes)]
        restore = lambda y, axis: (
            y
            if axis is None
            else jnp.expand_dims(y, output_position(axis, jnp.ndim(y) + 1))
        )
        return _map_results(restore, call(steps), out_axes)

    return block


def _fold_block(call, axes, out_axes, lowering: Lowering):
    time_major = next((axis == 0 for axis in axes if axis is not PER_STEP), False)

    def block(mapped):
        batch, timesteps = _fold_sizes(mapped, axes)
        folded = [_merge_time(x, axis, time_major) for x, axis in zip(mapped, axes)]
        y = _call_folded(call, folded, batch, timesteps)
        split = functools.partial(_split_time, batch, timesteps, time_major)
        return _map_results(split, y, out_axes)

    return block


def _fold_sizes(mapped, axes) -> tuple[Any, Any]:
    """`(batch, timesteps)`, the same for every array that has both."""
    folded = [(x, axis) for x, axis in zip(mapped, axes) if axis is not PER_STEP]
    for x, axis in folded:
        if x.ndim < 2:
            raise ValueError(
                "method='fold' needs a batch axis beside the time axis of every mapped "
                f"array, got {describe(x)} with time on axis {axis}. Use method='vmap'."
            )
    batches = {_batch_size(x, axis) for x, axis in folded}
    if len(batches) > 1:
        shapes = "; ".join(f"{describe(x)} with time on axis {a}" for x, a in folded)
        raise ValueError(
            "method='fold' needs one batch size in every mapped array (axis 0 without "
            f"the time axis), got {shapes}. Use method='vmap'."
        )
    x, axis = folded[0]
    return batches.pop(), x.shape[axis]


def _batch_size(x, axis):
    return x.shape[1] if axis == 0 else x.shape[0]


def _merge_time(x, axis: Axis, time_major: bool):
    """(batch, time, ...) -> (batch * time, ...), or (time * batch, ...)."""
    if axis is PER_STEP:
        return first_step(x, axis)
    # Adjacent in the order of the merge, the axes are merged by a reshape alone.
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
            f"{batch} * {timesteps} examples, and arguments shared by all steps (None "
            "in in_axes) as they are. If a shared argument has a batch axis, repeat it "
            "over time and map it, or use method='vmap'."
        )
        raise


def _map_results(fun, results, out_axes):
    """Maps `fun(leaf, axis)` over results, with axes from a pytree prefix."""
    axes = broadcast_axes("out_axes", out_axes, results, "the results")
    leaves, treedef = jax.tree.flatten(results)
    return jax.tree.unflatten(treedef, map(fun, leaves, axes))


def _check_shared_results(call, inputs: Inputs, out_axes) -> None:
    """Lets `vmap` refuse a result that is declared shared and depends on the step."""
    axes = jax.tree.leaves(out_axes, is_leaf=lambda node: node is None)
    if any(axis is None for axis in axes):
        reference = _vmap_block(call, inputs.mapped_axes, out_axes, Lowering())
        jax.eval_shape(reference, inputs.mapped)


def _check_fold_shapes(call, inputs: Inputs, out_axes, results) -> None:
    """Compares with one step's shapes, which must not depend on the batch size."""
    step = lambda mapped: call([*map(first_step, mapped, inputs.mapped_axes)])
    over_time = functools.partial(_over_time, time_size(inputs))
    wanted = _map_results(over_time, jax.eval_shape(step, inputs.mapped), out_axes)
    hide = lambda y, axis: None if isinstance(axis, PerStep) else jnp.asarray(y)
    got = _map_results(hide, results, out_axes)
    for want, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got)):
        if y.shape != want.shape:
            raise ValueError(
                "method='fold' needs results of the shape that the steps stacked have, "
                f"{describe(want)}: fun was given all examples of all steps at once, "
                f"and that made {describe(y)} of it. Use method='vmap'."
            )


def _over_time(timesteps, y, axis: Axis):
    """The shape of one step's result, with time; no shape for a layer's state."""
    if isinstance(axis, PerStep):
        return None
    shape = list(y.shape)
    if axis is not None:
        shape.insert(output_position(axis, y.ndim + 1), timesteps)
    return jax.ShapeDtypeStruct(shape, y.dtype)


def _maybe_remat(block, remat: bool, prevent_cse: bool = True):
    return jax.checkpoint(block, prevent_cse=prevent_cse) if remat else block


def _require_known_size(timesteps, unroll) -> None:
    if not isinstance(timesteps, int):
        raise ValueError(
            f"unroll={unroll} needs a known number of steps, got the symbolic size "
            f"{timesteps}. Use unroll=1."
        )


def _straight_line(block, inputs: Inputs, out_axes, timesteps, lowering: Lowering):
    block = _maybe_remat(block, lowering.remat)
    chunk = lowering.chunk_size or timesteps
    results = [
        block(_slice(inputs, start, min(start + chunk, timesteps)))
        for start in range(0, timesteps, chunk)
    ]
    return _concatenate(results, out_axes)


def _compiled_loop(block, inputs: Inputs, out_axes, timesteps, lowering: Lowering):
    chunk = lowering.chunk_size or timesteps
    whole = timesteps // chunk * chunk
    xs = [
        blocks_first(x, axis, chunk)
        for x, axis in zip(_slice(inputs, 0, whole), inputs.mapped_axes)
    ]
    body = _maybe_remat(block, lowering.remat, not _is_loop(whole // chunk, lowering))
    _, stacked = jax.lax.scan(
        lambda _, x: (None, body(x)), None, xs, unroll=int(lowering.unroll) or 1
    )
    results = _map_results(join_blocks, stacked, out_axes)
    if whole == timesteps:
        return results
    # Written like this, JAX knows that a symbolic size of the tail is not negative.
    stop = whole + timesteps % chunk
    tail = _maybe_remat(block, lowering.remat)(_slice(inputs, whole, stop))
    results = _concatenate([results, tail], out_axes)
    if isinstance(timesteps, int):
        return results
    return _map_results(functools.partial(_first_steps, timesteps), results, out_axes)


def _is_loop(blocks, lowering: Lowering) -> bool:
    """Whether `scan` leaves no block outside of a loop.

    Inside one nothing is merged across iterations, and `remat` needs no barriers. With
    no more blocks than `unroll`, or with a remainder, it does need them.
    """
    unroll = int(lowering.unroll) or 1
    # A symbolic number of blocks has unroll=1, and may well be more.
    return not isinstance(blocks, int) or (blocks > unroll and blocks % unroll == 0)


def _first_steps(timesteps, y, axis: Axis):
    """All steps; JAX can't tell that a sum of symbolic sizes is `timesteps`."""
    if axis is None:
        return y
    axis = output_position(axis, y.ndim)
    return jax.lax.dynamic_slice_in_dim(y, 0, timesteps, axis)


def _slice(inputs: Inputs, start, stop) -> list:
    pairs = zip(inputs.mapped, inputs.mapped_axes)
    return [slice_steps(x, axis, start, stop) for x, axis in pairs]


def _concatenate(blocks: list, out_axes):
    leaves, treedefs = zip(*(jax.tree.flatten(block) for block in blocks))
    axes = broadcast_axes("out_axes", out_axes, blocks[0], "the results")
    joined = [
        concatenate_blocks(list(each), axis) for *each, axis in zip(*leaves, axes)
    ]
    return jax.tree.unflatten(treedefs[0], joined)
