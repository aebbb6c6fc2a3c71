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

from tdjax._masks import masked_mean
from tdjax._steps.axes import (
    PER_STEP,
    Inputs,
    flatten_inputs,
    map_results,
    step_shape,
)
from tdjax._steps.mesh import MeshAxes, OnMesh, of_first_device, of_one_device
from tdjax._steps.stateful import (
    LayerState,
    after_steps,
    distribute_stateful,
    join_variables,
    run_steps,
    with_keys_of_steps,
)


def distribute_layer(
    step, shared, layer: LayerState, args, mask, in_axes, out_axes, lowering, sharding
) -> tuple[Any, Any]:
    """`(y, variables)`, as `distribute_stateful`; on a mesh if `sharding` is given.

    `step(shared, variables, keys, *args)` gets `shared` as it is, for JAX lets a
    function on a mesh not close over all arrays.
    """
    options = in_axes, out_axes, lowering
    if sharding is None:
        own_step = functools.partial(step, shared)
        return distribute_stateful(own_step, layer, args, mask, *options)
    inputs = flatten_inputs(args, in_axes)
    if lowering.capacity is None:  # Packed steps are others on each device.
        layer = with_keys_of_steps(layer, inputs)
    everywhere = shared, layer.variables
    on_mesh = OnMesh(sharding, _with_keys(inputs, layer, args), everywhere, mask)
    axes = on_mesh.axes
    batch = _batch_of_device(inputs, on_mesh)

    def call(arrays):
        (keys, own_args), everywhere, own_mask = on_mesh.rebuild(arrays)
        own_shared, variables = everywhere
        own_step = functools.partial(step, own_shared)
        if not layer.has_keys_of_steps and not layer.share_rng and axes.time:
            place = lax.axis_index(axes.time)
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, place), keys)
        own = layer._replace(variables=variables, keys=keys)
        y, carried, changed, new, weights = run_steps(
            own_step, own, own_args, own_mask, *options
        )
        _refuse_to_carry_over_devices(carried, axes, sharding)
        of_first = lambda y: of_first_device(y, axes.names)
        y = map_results(lambda y, a: of_first(y) if a is None else y, y, out_axes)
        combine = lambda old, new, weights: _of_all_devices(old, new, weights, axes)
        changed = after_steps(variables, changed, weights, combine)
        carried = {name: lax.pmean(x, axes.names) for name, x in carried.items()}
        return y, carried, changed, jax.tree.map(lambda x: _sown(x, batch, axes), new)

    y, carried, changed, new = on_mesh.shapes(call)
    specs = (
        map_results(lambda leaf, axis: axes.spec(axis, leaf.ndim), y, out_axes),
        *jax.tree.map(lambda _: PartitionSpec(), (carried, changed)),
        jax.tree.map(lambda x: _spec_of_sown(x, batch, axes), new),
    )
    y, carried, changed, new = on_mesh.run(call, specs)
    return y, join_variables(layer.variables, carried, changed, new)


def _with_keys(inputs: Inputs, layer: LayerState, args: tuple) -> Inputs:
    """The inputs `(keys, args)`."""
    keys = jax.tree.leaves(layer.keys)
    axes = [PER_STEP if layer.has_keys_of_steps else None] * len(keys)
    treedef = jax.tree.structure((layer.keys, args))
    return Inputs([*keys, *inputs.leaves], [*axes, *inputs.axes], treedef)


def _batch_of_device(inputs, on_mesh: OnMesh) -> int | None:
    """The number of examples of one device; None if no input has a batch."""
    pairs = zip(inputs.mapped, inputs.mapped_axes)
    steps = [step_shape(x, axis) for x, axis in pairs if isinstance(axis, int)]
    sizes = [x.shape[0] for x in steps if x.ndim]
    return sizes[0] // on_mesh.devices_of_batch if sizes else None


def _refuse_to_carry_over_devices(carried, axes: MeshAxes, sharding) -> None:
    if carried and axes.time:
        raise ValueError(
            "variable_carry takes state from step to step, so a device needs all of "
            f"them; got sharding={sharding}, which splits time. Split the batch alone."
        )


def _of_all_devices(before, stacked, weights, axes: MeshAxes):
    """One value of a variable, from those of the steps of all devices, time first."""
    timesteps = stacked.shape[0]
    if timesteps == 0:
        return before
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        # The mean of the moves, not of the values: what did not move stays as it is.
        moves, weights = stacked - before[None], _or_all(weights, timesteps)
        return before + masked_mean(moves, weights, axis=0, axis_name=axes.names)
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


def _has_batch(x, batch: int | None, axes: MeshAxes) -> bool:
    """Whether a sown value, time first, has the examples of a device behind."""
    return not axes.batch or x.shape[1:2] == (batch,)


def _sown(x, batch: int | None, axes: MeshAxes):
    """A sown value without examples is the mean of the devices, or the first's."""
    if _has_batch(x, batch, axes):
        return x
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return lax.pmean(x, axes.batch) if is_float else of_first_device(x, axes.batch)


def _spec_of_sown(x, batch: int | None, axes: MeshAxes) -> PartitionSpec:
    if x.ndim > 1 and axes.batch and _has_batch(x, batch, axes):
        return PartitionSpec(axes.time or None, axes.batch)
    return PartitionSpec(axes.time or None)
