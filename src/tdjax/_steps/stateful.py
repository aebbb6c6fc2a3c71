"""Flax layers over time: random keys, and the variables that a layer writes to.

An adapter gives a function of one step, `step(variables, keys, *args) -> (y,
variables)`, and a `LayerState`. Each step starts with the variables from before all
steps, except for those that are carried from step to step, and gets keys of its own.
What the steps write is sorted into two kinds: *changed* variables, of which one value
is kept, and *new* ones, such as sown values, which are stacked over time.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdjax._checks import describe, is_array, is_concrete, leaves_by_path, warn
from tdjax._masks import masked_mean
from tdjax._mesh import unsplit
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
from tdjax._steps.masked import MaskedSteps
from tdjax._steps.select_steps import is_time_major, select_steps


class LayerState(NamedTuple):
    """What a layer holds before the first step, and how the steps share it."""

    variables: Any
    keys: Any
    share_rng: bool = False
    # By the path of a variable: whether each step starts with what the last one wrote.
    is_carried: Callable[[Any], bool] = lambda path: False
    has_keys_of_steps: bool = False  # Or one key, which is split over the steps.


class AfterSteps(NamedTuple):
    """What all steps have returned and written.

    `carried` are the variables that went from step to step, after the last one;
    `changed` and `new` those of `_split`, time first; `weights` those of `Steps`.
    """

    y: Any
    carried: dict[str, Any]
    changed: Any
    new: Any
    weights: Any


def with_keys_of_steps(layer: LayerState, inputs: Inputs) -> LayerState:
    """The layer with a key for each step, unless all steps share them."""
    if layer.share_rng or layer.has_keys_of_steps:
        return layer
    split = lambda key: jax.random.split(key, time_size(inputs))
    keys = jax.tree.map(split, layer.keys)
    return layer._replace(keys=keys, has_keys_of_steps=True)


def join_variables(variables, carried: dict[str, Any], changed, new):
    """The variables after all steps."""
    return _join(_replace(variables, carried), changed, new)


def run_steps(
    step, layer: LayerState, args, mask, in_axes, out_axes, lowering, given=None
) -> AfterSteps:
    """Runs all steps, each with keys of its own.

    `given` are `(args, mask)` as the caller had them, of which a device has a part.
    """
    given_args, given_mask = given or (args, mask)
    if layer.share_rng and jax.tree.leaves(layer.keys):
        check_share_rng(lowering)
    steps = select_steps(flatten_inputs(args, in_axes), mask, lowering)
    layer = with_keys_of_steps(layer, steps.inputs)
    steps = steps.with_inputs(_with_keys(steps.inputs, layer))
    carried = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer.variables)
        if layer.is_carried(path)
    }
    call = functools.partial(_call_step, step, layer, steps.inputs)
    axes = (out_axes, PER_STEP, PER_STEP_OR_BATCH)
    results = distribute_carried(call, carried, steps, axes, lowering)
    (y, changed, new), carried = results
    if lowering.capacity is not None and not _is_one_batch(
        lowering, given_args, given_mask
    ):
        _refuse_statistics(changed, lowering.capacity)
    new = jax.tree.map(steps.hide_sown, new)
    before = _replace(layer.variables, carried)
    if isinstance(steps, MaskedSteps) and not _gets_mask(given_args, given_mask):
        time_major = is_time_major(flatten_inputs(args, in_axes))
        if is_concrete(given_mask):
            given_mask = np.asarray(given_mask)
        whole = given_mask.T if time_major else given_mask
        _warn_of_stand_ins(layer.variables, before, changed, whole)
    return AfterSteps(y, carried, changed, new, steps.weights)


def _call_step(step, layer: LayerState, inputs: Inputs, carried, mapped):
    """One step: `((y, changed, new), carried)`."""
    keys, args = inputs.rebuild(mapped)
    before = _replace(layer.variables, carried)
    y, after = step(before, keys, *args)
    written = leaves_by_path(after)
    # Carried variables are returned on their own, so here they count as unchanged.
    changed, new = _split(before, _replace(after, carried))
    _refuse_new_carried(new, layer.is_carried)
    after = {path: written.get(path, leaf) for path, leaf in carried.items()}
    return (y, changed, new), after


def _refuse_new_carried(new, is_carried) -> None:
    for path, _ in jax.tree_util.tree_leaves_with_path(new):
        if is_carried(path):
            raise ValueError(
                "State that goes from step to step must be there before the first "
                f"step, got none at {jax.tree_util.keystr(path)}. Make it by `init`."
            )


def check_share_rng(lowering: Lowering) -> None:
    """Refuses the lowerings under which steps can't share their noise."""
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


def check_carry(options: Any) -> None:
    """Refuses the options under which steps have no order."""
    carry = options.variable_carry
    if not carry:
        return
    for name, needed in {"method": "vmap", "axis_name": None, "capacity": None}.items():
        if (given := getattr(options, name)) != needed:
            raise ValueError(
                f"variable_carry={carry!r} takes state from step to step, so it needs "
                f"{name}={needed!r}, got {given!r}."
            )


def _is_one_batch(lowering: Lowering, args, mask) -> bool:
    """Whether a layer sees all packed steps at once, and which of them are valid."""
    in_one_block = lowering.method == "fold" and lowering.chunk_size is None

    def is_mask(x) -> bool:
        known = is_concrete(x) and is_concrete(mask)
        return x is mask or (known and np.array_equal(x, mask) and x.dtype == np.bool_)

    return in_one_block and any(map(is_mask, jax.tree.leaves(args)))


def _refuse_statistics(changed, capacity: int) -> None:
    for path, leaf in leaves_by_path(changed).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            step = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            raise ValueError(
                f"capacity={capacity} needs a layer that treats examples "
                f"independently, got one that writes {describe(step)} to its state at "
                f"{path}, a statistic over examples. For statistics over all valid "
                "steps, take method='fold' without chunk_size and a module that takes "
                "the mask of its step as an input, hands it to BatchNorm, and is "
                "called with (x, mask, mask=mask), the same array twice. Or call the "
                "layer for inference, or leave capacity out."
            )


def _gets_mask(args, mask) -> bool:
    """Whether an argument of the layer is the mask as well, or may be."""
    leaves = [x for x in jax.tree.leaves(args) if is_array(x)]
    fitting = [x for x in leaves if x.shape[: mask.ndim] == mask.shape]

    def may_be_mask(x) -> bool:
        if x.size > mask.size or not (is_concrete(x) and is_concrete(mask)):
            return x.dtype == jnp.bool_ or x.size == mask.size
        # Numbers such as ids have the same shape.
        return x.dtype == jnp.bool_ or np.array_equal(x != 0, mask)

    return any(map(may_be_mask, fitting))


def _warn_of_stand_ins(variables, before, changed, mask) -> None:
    """Warns of statistics over stand-ins."""
    if is_concrete(mask) and (np.all(mask, 0) | ~np.any(mask, 0)).all():
        return  # No step has both valid and masked examples.
    old, written = leaves_by_path(variables), leaves_by_path(changed)
    written |= {k: x for k, x in leaves_by_path(before).items() if x is not old[k]}
    # Those of BatchNorm, by its names in Linen and NNX; others may not be of examples.
    is_moment = re.compile(r"\b(mean|var)\b")
    floats = [k for k, x in written.items() if jnp.issubdtype(x.dtype, jnp.floating)]
    floats = [name.removeprefix("[0][0]") for name in floats if is_moment.search(name)]
    if floats:
        warn(
            f"With mask=, the layer writes statistics ({', '.join(floats[:2])}) over "
            "copies of valid examples in place of the masked ones. Wrap a module that "
            "takes the mask of its step, def __call__(self, x, mask), and calls "
            "BatchNorm with mask=mask[:, None] (images: mask[:, None, None, None]); "
            "then call the wrapper with (x, mask, mask=mask).",
        )


def first_steps(args: tuple, in_axes: Any) -> tuple:
    """The arguments of the first step; zeros if there are no steps."""
    inputs = flatten_inputs(args, in_axes)
    mapped = map(unsplit, inputs.mapped)
    return inputs.rebuild(map(first_step, mapped, inputs.mapped_axes))


def make_lowering(options: Any) -> Lowering:
    """The lowering that the fields of an adapter module ask for."""
    names = Lowering.__dataclass_fields__
    return Lowering(**{name: getattr(options, name) for name in names})


def _with_keys(inputs: Inputs, layer: LayerState) -> Inputs:
    """The inputs `(keys, args)`: keys for each step, or the same for all."""
    keys, treedef = jax.tree.flatten(layer.keys)
    axes = [None if layer.share_rng else PER_STEP] * len(keys)
    both = jax.tree_util.treedef_tuple((treedef, inputs.treedef))
    return Inputs([*keys, *inputs.leaves], [*axes, *inputs.axes], both)


def _replace(tree, leaves: dict[str, Any]):
    """`tree`, with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), tree
    )


def _split(before, after) -> tuple[Any, Any]:
    """`(changed, new)`: what has a place in `before`, and what has none.

    Both have the structure of `after`, with None for all other leaves.
    """
    known = leaves_by_path(before)

    def kind(path, leaf) -> str:
        old = known.get(jax.tree_util.keystr(path))
        if old is leaf:
            return "same"
        fits = old is not None and jnp.shape(old) == jnp.shape(leaf)
        return "changed" if fits else "new"

    pick = lambda wanted: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if kind(path, leaf) == wanted else None, after
    )
    return pick("changed"), pick("new")


def _join(before, changed, new):
    """The variables after all steps, from the two parts of `_split`."""
    known = leaves_by_path(before)

    def choose(path, changed, new):
        if changed is None and new is None:
            return known.get(jax.tree_util.keystr(path))
        return new if changed is None else changed

    return jax.tree_util.tree_map_with_path(
        choose, changed, new, is_leaf=lambda node: node is None
    )


def after_steps(before, changed, weights, after: Any = None):
    """One value for each changed variable, from those of all steps."""
    known, after = leaves_by_path(before), after or _after
    one = lambda path, x: after(known[jax.tree_util.keystr(path)], x, weights)
    return jax.tree_util.tree_map_with_path(one, changed)


def _after(before, stacked, weights):
    if stacked.shape[0] == 0:
        return before
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        return move_by_mean(before, stacked, weights)
    if weights is None:
        return stacked[-1]
    last = stacked.shape[0] - 1 - jnp.argmax(weights[::-1])
    return jnp.where(jnp.any(weights), stacked[last], before)


def move_by_mean(before, stacked, weights, axis_name=None):
    """Moves a float by the mean of what the steps moved it by, not to their mean.

    So what did not move stays as it is. `axis_name` are mesh axes, over all of which
    the mean is taken.
    """
    moves = stacked - jnp.expand_dims(before, 0)
    if weights is not None:
        weights = jnp.asarray(weights)
        return before + masked_mean(moves, weights, axis=0, axis_name=axis_name)
    mean = jnp.mean(moves, axis=0)
    return before + (mean if axis_name is None else jax.lax.pmean(mean, axis_name))
