"""Steps on the devices of a mesh that hold them.

`sharding=P(batch, time)` names the mesh axes that split batch and time. Each device
runs its own examples and steps through the chosen lowering, in a `jax.shard_map` over
these axes; the other axes of the mesh stay with the compiler. So the forward pass sends
nothing, and the backward pass sums the gradients of what all steps share once, outside
of every loop.

In come global arrays with their time axes. `OnMesh` says of each which part a device
gets: of what has a time axis its own examples and steps, of all else the whole. Out
come global arrays again.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from tdjax._checks import describe, is_array
from tdjax._steps.axes import (
    Axis,
    Inputs,
    PerStep,
    broadcast_axes,
    flatten_inputs,
    output_position,
)
from tdjax._steps.lowering import Lowering


class MeshAxes(NamedTuple):
    """The names of the mesh axes that split the batch, and those that split time."""

    batch: tuple[str, ...]
    time: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.batch + self.time

    def spec(self, time_axis: Axis, rank: int) -> PartitionSpec:
        """The part of an array with time on this axis that a device has."""
        if time_axis is None:
            return PartitionSpec()
        if isinstance(time_axis, PerStep):
            return PartitionSpec(self.time or None)
        time_axis = output_position(time_axis, rank)
        entries: list[Any] = [None] * rank
        entries[time_axis] = self.time or None
        if rank > 1:
            entries[1 if time_axis == 0 else 0] = self.batch or None
        return PartitionSpec(*entries)


def check_sharding(sharding: Any, lowering: Lowering) -> None:
    """Refuses what names no mesh axes of (batch, time)."""
    if sharding is None:
        return
    mesh_axes(sharding)
    if lowering.spmd_axis_name is not None:
        raise ValueError(
            f"spmd_axis_name={lowering.spmd_axis_name!r} names the mesh axis of time, "
            f"and so does sharding={sharding}. Give only sharding."
        )


def mesh_axes(sharding: Any) -> MeshAxes:
    """The axes that a `PartitionSpec` of (batch, time) names."""
    if not isinstance(sharding, PartitionSpec):
        raise TypeError(
            "sharding must be a jax.sharding.PartitionSpec of (batch, time), such as "
            f"P('data') or P('data', 'seq'), got {describe(sharding)}."
        )
    entries = [*sharding]
    are_names = [x is None or isinstance(x, str | tuple) for x in entries]
    if len(entries) > 2 or not all(are_names):
        raise ValueError(
            "sharding must name the mesh axes of the batch and those of time, and no "
            f"more, as in P('data', 'seq') or P(None, 'seq'), got {sharding}."
        )
    axes = MeshAxes(*map(_names, (*entries, None, None)[:2]))
    if not axes.names or len({*axes.names}) < len(axes.names):
        raise ValueError(
            "sharding must name at least one mesh axis, and each once, got "
            f"{sharding}. Leave it out to let the compiler choose."
        )
    return axes


def run_on_mesh(
    run: Callable, args: tuple, kwargs: dict, mask, in_axes, out_axes, sharding
) -> Any:
    """`run(args, kwargs, mask)` on each device, on its own examples and steps."""
    inputs = flatten_inputs(args, in_axes)
    on_mesh = OnMesh(sharding, inputs, kwargs, mask)
    axes, call = on_mesh.axes, lambda arrays: run(*on_mesh.rebuild(arrays))
    shapes = on_mesh.shapes(call)
    result_axes = broadcast_axes("out_axes", out_axes, shapes, "the results")
    leaves, treedef = jax.tree.flatten(shapes)
    for axis, leaf in zip(result_axes, leaves):
        _check_result(axis, leaf, axes, sharding)
    specs = [axes.spec(axis, leaf.ndim) for axis, leaf in zip(result_axes, leaves)]

    def call_with_shared_results(arrays):
        results = zip(jax.tree.leaves(call(arrays)), result_axes)
        of_first = functools.partial(of_first_device, names=axes.names)
        return [of_first(y) if axis is None else y for y, axis in results]

    return treedef.unflatten(on_mesh.run(call_with_shared_results, specs))


class OnMesh:
    """A call on the devices of a mesh: which part of each argument a device gets."""

    def __init__(self, sharding, inputs: Inputs, shared: Any, mask):
        self.axes = axes = mesh_axes(sharding)
        mesh = _mesh_in_context(sharding, axes)
        self.devices_of_batch = math.prod(mesh.shape[name] for name in axes.batch)
        others = jax.tree.leaves(shared)
        self._structures = inputs.treedef, jax.tree.structure(shared)
        self._leaves = [*inputs.leaves, *others, mask]
        self._is_array = list(map(is_array, self._leaves))
        time_axes = [*inputs.axes, *[None] * len(others), _mask_axis(inputs)]
        self._arrays = self._select(self._leaves)
        places = zip(self._arrays, self._select(time_axes))
        self._specs = [axes.spec(axis, x.ndim) for x, axis in places]
        _check_sizes(self._arrays, self._specs, mesh)
        if any(_is_explicit(mesh, name) for name in axes.names):
            pairs = zip(self._arrays, self._specs)
            self._arrays = [jax.sharding.reshard(*pair) for pair in pairs]

    def _select(self, items) -> list:
        return [x for x, chosen in zip(items, self._is_array) if chosen]

    def rebuild(self, arrays) -> tuple[tuple, Any, Any]:
        """`(args, shared, mask)` with the arrays of one device."""
        rest = iter([_own_noise(x, self.axes) for x in arrays])
        pairs = zip(self._leaves, self._is_array)
        *leaves, mask = [next(rest) if chosen else x for x, chosen in pairs]
        args, shared = self._structures
        size = args.num_leaves
        return args.unflatten(leaves[:size]), shared.unflatten(leaves[size:]), mask

    def shapes(self, call: Callable) -> Any:
        """The results of `call(arrays)` on one device, as shapes."""
        return jax.eval_shape(self._over(call, PartitionSpec()), self._arrays)

    def run(self, call: Callable, specs: Any) -> Any:
        """Runs `call(arrays)` on every device, and joins the results."""
        # Outside of `jit`, JAX can't leave some axes of the mesh to the compiler.
        return jax.jit(self._over(call, specs))(self._arrays)

    def _over(self, call: Callable, specs: Any) -> Callable:
        return jax.shard_map(
            call, in_specs=(self._specs,), out_specs=specs,
            axis_names={*self.axes.names},
            # A user's loop may start with zeros, which are the same on every device.
            check_vma=False,
        )  # fmt: skip


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _mask_axis(inputs: Inputs) -> int:
    """The time axis of the mask, which has the layout of the data."""
    axes = [axis for axis in inputs.mapped_axes if isinstance(axis, int)]
    return 0 if axes == [0] * len(axes) else 1


def _mesh_in_context(sharding, axes: MeshAxes):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"sharding={sharding} needs a mesh in context, got none. Call under "
            "`with jax.set_mesh(mesh):`."
        )
    for name in axes.names:
        if name not in mesh.axis_names:
            raise ValueError(
                f"sharding={sharding} must name axes of the mesh in context, which has "
                f"{mesh.axis_names}, got {name!r}."
            )
        if mesh._name_to_type[name] == AxisType.Manual:
            raise ValueError(
                f"sharding={sharding} names the axis {name!r}, over which a "
                "jax.shard_map around this call runs already. Leave it out: the "
                "arrays are those of one device."
            )
    return mesh


def _is_explicit(mesh, name: str) -> bool:
    return mesh._name_to_type[name] == AxisType.Explicit


def _check_sizes(arrays: list, specs: list, mesh) -> None:
    for x, spec in zip(arrays, specs):
        for axis, (size, entry) in enumerate(zip(x.shape, spec)):
            names = _names(entry)
            devices = math.prod(mesh.shape[name] for name in names)
            if size % devices:
                raise ValueError(
                    f"sharding splits axis {axis} of {describe(x)} over {devices} "
                    f"devices ({', '.join(names)}), which must divide its size, got "
                    f"{size}. Pad it, with a mask, or name other mesh axes."
                )


def _check_result(axis: Axis, y, axes: MeshAxes, sharding) -> None:
    if axis is not None and y.ndim < 2 and axes.batch:
        raise ValueError(
            f"sharding={sharding} splits the batch, so every result needs a batch axis "
            f"beside time, got {describe(y)} of one device. Reduce over the batch "
            "outside of fun."
        )


def _own_noise(x, axes: MeshAxes):
    """Random keys, another for each part of the batch."""
    if not axes.batch or not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    fold_in = lambda key: jax.random.fold_in(key, jax.lax.axis_index(axes.batch))
    for _ in range(x.ndim):
        fold_in = jax.vmap(fold_in)
    return fold_in(x)


def of_first_device(y, names: tuple[str, ...]):
    """A result that all devices have, known to be the same on all of them."""
    return of_one_device(y, jax.lax.axis_index(names) == 0, names)


def of_one_device(y, is_chosen, names: tuple[str, ...]):
    """On all devices, the result of the only one for which `is_chosen`."""
    kept = jnp.where(is_chosen, y, jnp.zeros_like(y))
    is_bool = kept.dtype == jnp.bool_
    total = jax.lax.psum(kept.astype(jnp.int8) if is_bool else kept, names)
    return total.astype(jnp.bool_) if is_bool else total
