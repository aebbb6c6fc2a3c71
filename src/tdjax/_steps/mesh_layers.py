"""Flax layers on the devices of a mesh: one value of each variable for all of them.

Each device runs its own examples and steps (`mesh`), as `stateful` does it on one. What
the devices have written then becomes one value, by the rule for the steps of one
device: floats move by the mean over the steps of all devices, anything else is what the
last step with a valid example wrote. Sown values go back to their steps and examples.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from tdjax._checks import describe, leaves_by_path
from tdjax._masks import over_trailing_axes
from tdjax._mesh import typed_spec
from tdjax._steps.axes import (
    PER_STEP,
    Inputs,
    flatten_inputs,
    map_results,
)
from tdjax._steps.explicit import run_as_types_say
from tdjax._steps.mesh import (
    MeshAxes,
    OnMesh,
    of_first_device,
    of_one_device,
    own_keys,
)
from tdjax._steps.select_steps import check_mask
from tdjax._steps.stateful import (
    LayerState,
    after_steps,
    join_variables,
    move_by_mean,
    run_steps,
    with_keys_of_steps,
)


def distribute_layer(
    step, shared, layer: LayerState, args, mask, in_axes, out_axes, lowering, sharding
) -> tuple[Any, Any]:
    """Runs `step(shared, variables, keys, *args) -> (y, variables)` over all steps.

    Returns `(y, variables)`, those after all steps. Variables keep their shapes: floats
    (running statistics) move by the mean over steps, anything else (counters, keys) is
    what the last step wrote. New ones are stacked, time first. Steps without a valid
    example move nothing. What no step writes to stays the same object, not a copy.

    `step(shared, variables, keys, *args)` gets `shared` as it is, for JAX lets a
    function on a mesh not close over all arrays.
    """
    options = in_axes, out_axes, lowering
    if sharding is None:
        return _distribute_as_types_say(step, shared, layer, args, mask, *options)
    return _distribute_on_mesh(step, shared, layer, args, mask, *options, sharding)


def _distribute_as_types_say(
    step, shared, layer: LayerState, args, mask, in_axes, out_axes, lowering
) -> tuple[Any, Any]:
    variables = layer.variables
    inputs = flatten_inputs(args, in_axes)

    def run(everything):
        shared, variables, keys, args, mask = everything
        own = layer._replace(variables=variables, keys=keys)
        own_step = functools.partial(step, shared)
        y, carried, changed, new, weights = run_steps(
            own_step, own, args, mask, in_axes, out_axes, lowering
        )
        return y, carried, after_steps(variables, changed, weights), new

    def one_step(mapped):
        keys = layer.keys
        if layer.has_keys_of_steps:
            keys = jax.tree.map(lambda key: key[0], keys)
        return step(shared, variables, keys, *inputs.rebuild(mapped))[0]

    def specs_of(results, split):
        y, *state = results
        return map_results(split.spec, y, out_axes), *jax.tree.map(typed_spec, state)

    everything = shared, variables, layer.keys, args, mask
    y, carried, changed, new = run_as_types_say(
        run, everything, one_step, inputs, mask, lowering, specs_of
    )
    return y, join_variables(variables, carried, changed, new)


def _distribute_on_mesh(
    step, shared, layer: LayerState, args, mask, in_axes, out_axes, lowering, sharding
) -> tuple[Any, Any]:
    options = in_axes, out_axes, lowering
    inputs = flatten_inputs(args, in_axes)
    if mask is not None:
        check_mask(mask, inputs)
    if lowering.capacity is None:  # Packed steps are others on each device.
        layer = with_keys_of_steps(layer, inputs)
    everywhere = shared, layer.variables
    on_mesh = OnMesh(sharding, _with_keys(inputs, layer, args), everywhere, mask)
    axes = on_mesh.axes
    # One key for all packed steps is another on each device.
    is_one_key = not layer.has_keys_of_steps and not layer.share_rng
    names_of_keys = axes.names if is_one_key else axes.batch

    def run(arrays):
        (keys, own_args), everywhere, own_mask = on_mesh.rebuild(arrays)
        own_shared, variables = everywhere
        keys = jax.tree.map(lambda key: own_keys(key, names_of_keys), keys)
        own = layer._replace(variables=variables, keys=keys)
        own_step = functools.partial(step, own_shared)
        y, carried, changed, new, weights = run_steps(
            own_step, own, own_args, own_mask, *options, (args, mask)
        )
        _refuse_on_devices(carried, new, lowering, sharding, axes)
        y = on_mesh.share_results(y, out_axes)
        combine = lambda old, new, weights: _of_all_devices(old, new, weights, axes)
        changed = after_steps(variables, changed, weights, combine)
        carried = _carried_of_all_devices(variables, carried, weights, combine)
        return (y, carried, changed, new), weights

    y, carried, changed, new = on_mesh.shapes(lambda arrays: run(arrays)[0])
    places = _axes_of_examples(on_mesh, new, lambda arrays: run(arrays)[0][-1])

    def call(arrays):
        (*others, new), weights = run(arrays)
        of_all = lambda x, axis: x if axis else _sown(x, weights, axes)
        return *others, jax.tree.map(of_all, new, places)

    specs = (
        on_mesh.specs_of_results(y, out_axes),
        *jax.tree.map(lambda _: PartitionSpec(), (carried, changed)),
        jax.tree.map(lambda axis: _spec_of_sown(axis, axes), places),
    )
    y, carried, changed, new = on_mesh.run(call, specs)
    return y, join_variables(layer.variables, carried, changed, new)


def _axes_of_examples(on_mesh: OnMesh, values, sown) -> Any:
    """Of each sown value, time first, the axis of the examples, or 0 if it has none.

    It is the one that a larger batch makes larger; its size alone may be a coincidence.
    `values` are the shapes of `sown(arrays)`.
    """
    if not on_mesh.axes.batch or not jax.tree.leaves(values):
        return jax.tree.map(lambda _: 0, values)
    try:
        twice = on_mesh.shapes(sown, batches=2)
    except Exception:  # The layer was made for one size.
        return jax.tree.map(lambda x: int(x.shape[1:2] == (on_mesh.batch,)), values)
    return jax.tree.map(_larger_axis, values, twice)


def _larger_axis(x, larger) -> int:
    pairs = zip(x.shape, larger.shape)
    places = [axis for axis, (size, other) in enumerate(pairs) if size != other]
    if len(places) > 1 or x.ndim != larger.ndim:
        raise ValueError(
            "On a mesh a sown value needs at most one axis that grows with the batch, "
            f"got {describe(x)} of one device's steps. Sow less, or split time alone."
        )
    return places[0] if places else 0


def _with_keys(inputs: Inputs, layer: LayerState, args: tuple) -> Inputs:
    """The inputs `(keys, args)`."""
    keys = jax.tree.leaves(layer.keys)
    axes = [PER_STEP if layer.has_keys_of_steps else None] * len(keys)
    treedef = jax.tree.structure((layer.keys, args))
    return Inputs([*keys, *inputs.leaves], [*axes, *inputs.axes], treedef)


def _refuse_on_devices(carried, new, lowering, sharding, axes: MeshAxes) -> None:
    if carried and axes.time:
        raise ValueError(
            "variable_carry takes state from step to step, so a device needs all of "
            f"them; got sharding={sharding}, which splits time. Split the batch alone."
        )
    if jax.tree.leaves(new) and lowering.capacity is not None:
        raise ValueError(
            f"With capacity={lowering.capacity} a layer sows values of packed steps, "
            f"which have no order over the devices of sharding={sharding}. Leave their "
            "collection out of mutable, or capacity."
        )


def _carried_of_all_devices(variables, carried, weights, combine) -> dict[str, Any]:
    """What went from step to step and was written, as one value for all devices."""
    before = leaves_by_path(variables)
    has_steps = None if weights is None else jnp.any(jnp.asarray(weights))[None]
    return {
        name: combine(before[name], x[None], has_steps)
        for name, x in carried.items()
        if x is not before[name]
    }


def _of_all_devices(before, stacked, weights, axes: MeshAxes):
    """One value of a variable, from those of the steps of all devices, time first."""
    timesteps = stacked.shape[0]
    if timesteps == 0:
        return before
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        return move_by_mean(before, stacked, weights, axes.names)
    weights = _or_all(weights, timesteps)
    last = timesteps - 1 - jnp.argmax(weights[::-1])
    first = lax.axis_index(axes.time) * timesteps if axes.time else 0
    step = jnp.where(jnp.any(weights), first + last, -1)
    newest, place = lax.pmax(step, axes.names), lax.axis_index(axes.names)
    # Of devices with the same steps, the first.
    candidates = jnp.where(step == newest, place, jnp.iinfo(place.dtype).max)
    is_chosen = place == lax.pmin(candidates, axes.names)
    written = of_one_device(stacked[last], is_chosen, axes.names)
    return jnp.where(newest >= 0, written, before)


def _or_all(weights, timesteps: int):
    """The mask of the steps that count."""
    return jnp.ones(timesteps, bool) if weights is None else jnp.asarray(weights)


def _sown(x, weights, axes: MeshAxes):
    """A sown value without examples: the mean of the devices, or the first's."""
    if not axes.batch:
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return of_first_device(x, axes.batch)
    valid = over_trailing_axes(_or_all(weights, x.shape[0]), x.ndim)
    total, count = lax.psum((jnp.where(valid, x, 0), 1 * valid), axes.batch)
    return total / jnp.maximum(count, 1).astype(x.dtype)


def _spec_of_sown(axis: int, axes: MeshAxes) -> PartitionSpec:
    """`axis` is that of the examples, or 0."""
    others = [None] * (axis - 1) + [axes.batch] if axis else []
    return PartitionSpec(axes.time or None, *others)
