"""Loops over blocks of steps: compiled by `jax.lax.scan`, or in straight-line code.

`block` is a function of the leaves that have a time axis, for any number of steps. Both
loops slice the inputs into blocks of `chunk` steps and join the results on the time
axis; the last block may be shorter.
"""

import functools

import jax

from tdjax._steps.axes import (
    Axis,
    Inputs,
    blocks_first,
    broadcast_axes,
    concatenate_blocks,
    join_blocks,
    map_results,
    output_position,
    slice_steps,
    time_size,
)


def maybe_remat(block, remat: bool, prevent_cse: bool = True):
    """`block`, with its activations computed again in the backward pass if asked."""
    return jax.checkpoint(block, prevent_cse=prevent_cse) if remat else block


def straight_line(block, inputs: Inputs, out_axes, chunk: int, remat: bool):
    """All blocks written out, one after the other."""
    timesteps, block = time_size(inputs), maybe_remat(block, remat)
    results = [
        block(_slice(inputs, start, min(start + chunk, timesteps)))
        for start in range(0, timesteps, chunk)
    ]
    return _concatenate(results, out_axes)


def compiled_loop(block, inputs: Inputs, out_axes, chunk: int, unroll: int, remat):
    """A `scan` over the full blocks, and then the shorter last one."""
    timesteps = time_size(inputs)
    whole = timesteps // chunk * chunk
    xs = [
        blocks_first(x, axis, chunk)
        for x, axis in zip(_slice(inputs, 0, whole), inputs.mapped_axes)
    ]
    body = maybe_remat(block, remat, not _is_all_loop(whole // chunk, unroll))
    _, stacked = jax.lax.scan(lambda _, x: (None, body(x)), None, xs, unroll=unroll)
    results = map_results(join_blocks, stacked, out_axes)
    if whole == timesteps:
        return results
    # Written like this, JAX knows that a symbolic size of the tail is not negative.
    stop = whole + timesteps % chunk
    tail = maybe_remat(block, remat)(_slice(inputs, whole, stop))
    results = _concatenate([results, tail], out_axes)
    if isinstance(timesteps, int):
        return results
    return map_results(functools.partial(_first_steps, timesteps), results, out_axes)


def _is_all_loop(blocks, unroll: int) -> bool:
    """Whether `scan` leaves no block outside of a loop.

    Inside a loop XLA merges nothing across iterations, so `remat` needs no barriers.
    Blocks outside, if there are at most `unroll` or a remainder, do need them.
    """
    # With a symbolic number of blocks `unroll` is 1.
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
    """Joins the results of several blocks, leaf by leaf."""
    leaves, treedefs = zip(*(jax.tree.flatten(block) for block in blocks))
    axes = broadcast_axes("out_axes", out_axes, blocks[0], "the results")
    joined = [concatenate_blocks([*parts], axis) for *parts, axis in zip(*leaves, axes)]
    return jax.tree.unflatten(treedefs[0], joined)
