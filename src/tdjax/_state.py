"""What the Flax adapters share: options as fields, random keys and state over steps."""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._axes import (
    PER_STEP,
    PER_STEP_OR_BATCH,
    Inputs,
    first_step,
    flatten_inputs,
    time_size,
)
from tdjax._lowering import Lowering, distribute


def distribute_stateful(
    step, before, keys, args, in_axes, out_axes, lowering, share_rng
):
    """Runs `step(keys, *args) -> (y, state)` over all steps.

    Returns `(y, state)`, where the state is that after all steps: what was in
    `before` keeps its shape, floats (running statistics) moved by the mean over steps,
    anything else (counters, keys) as the last step left it. What is new (sown values)
    is stacked, time first. What no step wrote to is the very object of `before`, of
    which no copies are made. Each step gets keys of its own, unless `share_rng`.
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
        y, state = step(step_keys, *step_args)
        return y, *_split_state(before, state)

    axes = (out_axes, PER_STEP, PER_STEP_OR_BATCH)
    y, kept, new = distribute(call, both, axes, lowering)
    return y, _join_state(before, _after_steps(before, kept), new)


def first_steps(args: tuple, in_axes: Any) -> tuple:
    """The arguments of the first step; zeros if there are no steps."""
    inputs = flatten_inputs(args, in_axes)
    return inputs.rebuild(map(first_step, inputs.mapped, inputs.mapped_axes))


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


def _by_path(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _split_state(before, state) -> tuple[Any, Any]:
    """What was there and has changed, and what is new; None stands for all else."""
    known = _by_path(before)

    def kind(path, leaf) -> str:
        old = known.get(jax.tree_util.keystr(path))
        if old is leaf:
            return "same"
        fits = old is not None and jnp.shape(old) == jnp.shape(leaf)
        return "changed" if fits else "new"

    pick = lambda wanted: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if kind(path, leaf) == wanted else None, state
    )
    return pick("changed"), pick("new")


def _join_state(before, changed, new):
    known = _by_path(before)

    def either(path, a, b):
        if a is None and b is None:
            return known.get(jax.tree_util.keystr(path))
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(
        either, changed, new, is_leaf=lambda node: node is None
    )


def _after_steps(before, kept):
    known = _by_path(before)
    after = lambda path, x: _after(known[jax.tree_util.keystr(path)], x)
    return jax.tree_util.tree_map_with_path(after, kept)


def _after(before, stacked):
    if stacked.shape[0] == 0:
        return before
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        # The mean of the moves, not of the values: what did not move stays as it is.
        return before + jnp.mean(stacked - before, axis=0)
    return stacked[-1]
