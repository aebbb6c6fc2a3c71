"""What the Flax adapters share: options as fields, random keys and state over steps."""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._axes import PER_STEP, Inputs, flatten_inputs, time_size
from tdjax._lowering import Lowering, distribute


def distribute_stateful(step, keys, args, in_axes, out_axes, lowering, share_rng):
    """Runs `step(keys, *args) -> (y, state)` over all steps.

    Returns `(y, states)`, where `states` has a leading time axis. Each step gets keys
    of its own, unless `share_rng`.
    """
    if share_rng and lowering.method == "fold" and jax.tree.leaves(keys):
        raise ValueError(
            "share_rng=True needs method='vmap': with method='fold' the layer draws "
            "noise once for all examples and steps of a block."
        )
    inputs = flatten_inputs(args, in_axes)
    if not share_rng:
        keys = _split_keys(keys, time_size(inputs))
    both = _with_keys(inputs, keys, None if share_rng else PER_STEP)

    def call(mapped):
        step_keys, step_args = both.rebuild(mapped)
        return step(step_keys, *step_args)

    return distribute(call, both, (out_axes, PER_STEP), lowering)


def first_step(args: tuple, in_axes: Any) -> tuple:
    """The arguments of the first step; zeros if there are no steps."""
    inputs = flatten_inputs(args, in_axes)

    def first(x, axis):
        if x.shape[axis] == 0:
            return jnp.zeros((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)
        return jax.lax.index_in_dim(x, 0, axis, keepdims=False)

    return inputs.rebuild(map(first, inputs.mapped, inputs.mapped_axes))


def over_steps(before: Any, after: Any) -> Any:
    """State after all steps, from `after` with a leading time axis.

    What was there before keeps its shape: floats (running statistics) move by the mean
    over steps; anything else (counters, keys) is the last step's. What is new (sown
    values) stays stacked, time first. No steps leave the state as it was.
    """
    known = {
        _path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(before)
    }
    merge = lambda path, stacked: _over_steps(known.get(_path(path)), stacked)
    return jax.tree_util.tree_map_with_path(merge, after)


def make_lowering(options: Any) -> Lowering:
    """From the fields of an adapter module."""
    names = Lowering.__dataclass_fields__
    return Lowering(**{name: getattr(options, name) for name in names})


def _split_keys(keys, timesteps):
    return jax.tree.map(lambda key: jax.random.split(key, timesteps), keys)


def _with_keys(inputs: Inputs, keys, axis) -> Inputs:
    leaves, treedef = jax.tree.flatten(keys)
    axes = [axis] * len(leaves)
    both = jax.tree_util.treedef_tuple((treedef, inputs.treedef))
    return Inputs([*leaves, *inputs.leaves], [*axes, *inputs.axes], both)


def _path(path) -> str:
    return jax.tree_util.keystr(path)


def _over_steps(before, stacked):
    if before is None or jnp.shape(before) != stacked.shape[1:]:
        return stacked
    if stacked.shape[0] == 0:
        return before
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        return jnp.mean(stacked, axis=0)
    return stacked[-1]
