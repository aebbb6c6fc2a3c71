"""What the Flax adapters share: options as fields, random keys and state over steps."""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe
from tdjax._masks import masked_mean
from tdjax._steps.axes import (
    PER_STEP,
    PER_STEP_OR_BATCH,
    Inputs,
    first_step,
    flatten_inputs,
    time_size,
)
from tdjax._steps.carried import distribute_carried
from tdjax._steps.lowering import Lowering
from tdjax._steps.masked import PackedSteps, select_steps


def distribute_stateful(
    step,
    before,
    keys,
    args,
    mask,
    in_axes,
    out_axes,
    lowering,
    share_rng,
    is_carried=lambda path: False,
):
    """Runs `step(before, keys, *args) -> (y, state)` over all steps.

    Returns `(y, state)`, where the state is that after all steps: what was in
    `before` keeps its shape, floats (running statistics) moved by the mean over steps,
    anything else (counters, keys) as the last step left it. What is new (sown values)
    is stacked, time first. What no step wrote to is the very object of `before`, of
    which no copies are made. Each step gets keys of its own, unless `share_rng`. Steps
    without a valid example move no running statistics.

    State of which `is_carried(path)` goes from step to step instead.
    """
    if share_rng and jax.tree.leaves(keys):
        check_share_rng(lowering)
    steps = select_steps(flatten_inputs(args, in_axes), mask, lowering)
    if not share_rng:
        keys = _split_keys(keys, time_size(steps.inputs))
    steps.inputs = _with_keys(steps.inputs, keys, None if share_rng else PER_STEP)

    leaves = jax.tree_util.tree_leaves_with_path(before)
    carried = {
        jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_carried(path)
    }

    def call(carried, mapped):
        step_keys, step_args = steps.inputs.rebuild(mapped)
        start = _replace(before, carried)
        y, state = step(start, step_keys, *step_args)
        found = _by_path(state)
        after = {path: found.get(path, leaf) for path, leaf in carried.items()}
        kept, new = _split_state(start, _replace(state, carried))
        _refuse_new_carried(new, is_carried)
        return (y, kept, new), after

    axes = (out_axes, PER_STEP, PER_STEP_OR_BATCH)
    results = distribute_carried(call, carried, steps, axes, lowering)
    (y, kept, new), carried = results
    if isinstance(steps, PackedSteps):
        _refuse_statistics(kept, lowering.capacity)
    new = jax.tree.map(steps.hide_sown, new)
    before = _replace(before, carried)
    return y, _join_state(before, _after_steps(before, kept, steps.weights), new)


def _refuse_new_carried(new, is_carried) -> None:
    for path, _ in jax.tree_util.tree_leaves_with_path(new):
        if is_carried(path):
            raise ValueError(
                "State that goes from step to step must be there before the first "
                f"step, got none at {jax.tree_util.keystr(path)}. Make it by `init`."
            )


def check_share_rng(lowering: Lowering) -> None:
    if lowering.method == "fold":
        raise ValueError(
            "share_rng=True needs method='vmap': with method='fold' the layer draws "
            "noise once for all examples and steps of a block."
        )
    if lowering.capacity is not None:
        raise ValueError(
            f"share_rng=True gives all steps of an example the same noise; with "
            f"capacity={lowering.capacity} the steps of all examples are one sequence, "
            "and all would share it. Leave one of them out."
        )


def _refuse_statistics(kept, capacity: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            step = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            raise ValueError(
                f"capacity={capacity} needs a layer that treats examples "
                f"independently, got one that writes {describe(step)} to its state at "
                f"{jax.tree_util.keystr(path)}, a statistic over examples. Call the "
                "layer for inference, or leave capacity out."
            )


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


def _replace(tree, leaves: dict[str, Any]):
    """`tree`, with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), tree
    )


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


def _after_steps(before, kept, weights):
    known = _by_path(before)
    after = lambda path, x: _after(known[jax.tree_util.keystr(path)], x, weights)
    return jax.tree_util.tree_map_with_path(after, kept)


def _after(before, stacked, weights):
    if stacked.shape[0] == 0:
        return before
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        # The mean of the moves, not of the values: what did not move stays as it is.
        moves = stacked - before
        if weights is None:
            return before + jnp.mean(moves, axis=0)
        return before + masked_mean(moves, jnp.asarray(weights), axis=0)
    if weights is None:
        return stacked[-1]
    last = stacked.shape[0] - 1 - jnp.argmax(weights[::-1])
    return jnp.where(jnp.any(weights), stacked[last], before)
