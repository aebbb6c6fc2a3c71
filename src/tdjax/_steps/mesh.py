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

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tdjax._checks import describe, is_array
from tdjax._mesh import (
    check_sizes,
    closures_explained,
    names_in,
    over_mesh,
    refuse_varying,
    require_mesh,
    require_spec,
    reshard,
)
from tdjax._steps.axes import (
    Axis,
    Inputs,
    PerStep,
    batch_size,
    flatten_inputs,
    map_results,
    output_position,
)
from tdjax._steps.lowering import Lowering
from tdjax._steps.masked import is_key
from tdjax._steps.select_steps import check_mask, is_time_major


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
    axes = mesh_axes(sharding)
    if lowering.spmd_axis_name is not None:
        raise ValueError(
            f"spmd_axis_name={lowering.spmd_axis_name!r} names the mesh axis of time, "
            f"and so does sharding={sharding}. Give only sharding."
        )
    if lowering.axis_name is not None and (
        axes.time or lowering.axis_name in axes.names
    ):
        raise ValueError(
            f"axis_name={lowering.axis_name!r} lets fun see all steps at once, but "
            f"with sharding={sharding} a device has a part of them, or another axis of "
            "this name. Split the batch alone, or use collectives over the mesh axes."
        )


def mesh_axes(sharding: Any) -> MeshAxes:
    """The axes that a `PartitionSpec` of (batch, time) names."""
    entries = require_spec("sharding", sharding, 2, "(batch, time)")
    axes = MeshAxes(*map(names_in, entries))
    if not axes.names:
        raise ValueError(
            f"sharding must name at least one mesh axis, got {sharding}. Leave it out "
            "to let the compiler choose."
        )
    return axes


def devices_of_time(sharding: PartitionSpec | None) -> int:
    """Over how many devices of the mesh in context time is split."""
    if sharding is None:
        return 1
    axes = mesh_axes(sharding)
    mesh = require_mesh(f"sharding={sharding}", axes.names, [])
    return math.prod(mesh.shape[name] for name in axes.time)


def run_on_mesh(
    run: Callable,
    args: tuple,
    kwargs: dict,
    mask,
    in_axes,
    out_axes,
    lowering,
    sharding,
) -> Any:
    """`run(args, kwargs, mask)` on each device, on its own examples and steps."""
    inputs = flatten_inputs(args, in_axes)
    if mask is not None:
        check_mask(mask, inputs)
    on_mesh = OnMesh(sharding, inputs, kwargs, mask)
    axes = on_mesh.axes
    # In one call of fun for many steps, steps don't share their noise.
    is_one_call = lowering.method == "fold" or lowering.capacity is not None
    names = axes.names if is_one_call else axes.batch

    def call(arrays):
        leaves = on_mesh.fold_in_keys(arrays, names)
        results = run(*on_mesh.rebuild(leaves))
        return on_mesh.share_results(results, out_axes)

    specs = on_mesh.specs_of_results(on_mesh.shapes(call), out_axes)
    return on_mesh.run(call, specs)


class OnMesh:
    """A call on the devices of a mesh: which part of each argument a device gets."""

    def __init__(self, sharding, inputs: Inputs, shared: Any, mask):
        self.axes, self._sharding = mesh_axes(sharding), sharding
        axes = self.axes
        others = jax.tree.leaves(shared)
        self._structures = inputs.treedef, jax.tree.structure(shared)
        self._leaves = [*inputs.leaves, *others, mask]
        # Scalars of NumPy, such as flags, may have to be known.
        self._is_array = [
            is_array(x) and not isinstance(x, np.generic) for x in self._leaves
        ]
        time_axes = [*inputs.axes, *[None] * len(others), _mask_axis(inputs)]
        arrays, option = self._select(self._leaves), f"sharding={sharding}"
        self._time_axes = self._select(time_axes)
        places = zip(arrays, self._time_axes)
        self._specs = [axes.spec(axis, x.ndim) for x, axis in places]
        self._mesh = require_mesh(option, axes.names, arrays)
        refuse_varying(option, arrays)
        devices = math.prod(self._mesh.shape[name] for name in axes.batch)
        # The number of examples of one device.
        self.batch = _batch_size(inputs, sharding) // devices if axes.batch else None
        check_sizes(option, arrays, self._specs, self._mesh, "Pad it, with a mask")
        self._arrays = reshard(arrays, self._specs, self._mesh)

    def _select(self, items) -> list:
        return [x for x, chosen in zip(items, self._is_array) if chosen]

    def rebuild(self, arrays) -> tuple[tuple, Any, Any]:
        """`(args, shared, mask)` with the arrays of one device."""
        rest = iter(arrays)
        pairs = zip(self._leaves, self._is_array)
        *leaves, mask = [next(rest) if chosen else x for x, chosen in pairs]
        args, shared = self._structures
        size = args.num_leaves
        return args.unflatten(leaves[:size]), shared.unflatten(leaves[size:]), mask

    def fold_in_keys(self, arrays: list, names_of_shared: tuple[str, ...]) -> list:
        """Random keys, others for each part of the batch; those of all steps, others
        for each device along these axes."""
        pairs = zip(arrays, self._time_axes)
        names = lambda axis: names_of_shared if axis is None else self.axes.batch
        return [own_keys(x, names(axis)) if is_key(x) else x for x, axis in pairs]

    def share_results(self, results: Any, out_axes: Any) -> Any:
        """Takes what all steps share from the first device."""
        of_first = lambda y: of_first_device(y, self.axes.names)
        share = lambda y, axis: of_first(jnp.asarray(y)) if axis is None else y
        return map_results(share, results, out_axes)

    def specs_of_results(self, shapes: Any, out_axes: Any) -> Any:
        """Where the results of one device go, after checking that they have a place."""

        def spec(y, axis: Axis):
            if isinstance(axis, int) and self.batch is not None:
                self._check_batch(y, axis)
            return self.axes.spec(axis, y.ndim)

        return map_results(spec, shapes, out_axes)

    def _check_batch(self, y, axis: int) -> None:
        if y.ndim < 2 or batch_size(y, output_position(axis, y.ndim)) != self.batch:
            raise ValueError(
                f"sharding={self._sharding} splits the batch, so every result needs a "
                f"batch axis beside time, of {self.batch} examples on each device, "
                f"got {describe(y)}. Reduce over the batch outside of fun; give an "
                "argument that has a batch a time axis too, so that it is not shared."
            )

    def shapes(self, call: Callable, batches: int = 1) -> Any:
        """The results of `call(arrays)` on one device, as shapes.

        `batches` makes its batch that many times as large.
        """
        over = self._over(call, PartitionSpec())
        if batches == 1:
            return jax.eval_shape(over, self._arrays)
        whole = [PartitionSpec(*[None] * x.ndim) for x in self._arrays]

        def on_more(arrays):
            arrays = reshard(arrays, whole, self._mesh)
            pairs = zip(arrays, self._time_axes)
            arrays = [_repeat_batch(x, axis, batches) for x, axis in pairs]
            return over(reshard(arrays, self._specs, self._mesh))

        return jax.eval_shape(on_more, self._arrays)

    def run(self, call: Callable, specs: Any) -> Any:
        """Runs `call(arrays)` on every device, and joins the results."""
        # Outside of `jit`, JAX can't leave some axes of the mesh to the compiler.
        return jax.jit(self._over(call, specs))(self._arrays)

    def _over(self, call: Callable, specs: Any) -> Callable:
        over = over_mesh(call, self._mesh, self.axes.names, (self._specs,), specs)

        def run(arrays):
            with closures_explained(f"sharding={self._sharding}"):
                return over(arrays)

        return run


def _repeat_batch(x, time_axis: Axis, times: int):
    if not isinstance(time_axis, int) or x.ndim < 2:
        return x
    return jnp.concatenate([x] * times, axis=1 if time_axis == 0 else 0)


def _batch_size(inputs: Inputs, sharding) -> Any:
    """That of all arguments with a time axis."""
    pairs = zip(inputs.mapped, inputs.mapped_axes)
    arrays = [(x, axis) for x, axis in pairs if isinstance(axis, int)]
    sizes = {batch_size(x, axis) for x, axis in arrays if x.ndim > 1}
    if len(sizes) != 1:
        found = ", ".join(describe(x) for x, _ in arrays)
        raise ValueError(
            f"sharding={sharding} splits the batch, so the arguments with a time axis "
            f"need one batch axis beside it, of the same size in all, got {found}. "
            "Repeat what has none (jnp.broadcast_to), or split time alone."
        )
    return sizes.pop()


def _mask_axis(inputs: Inputs) -> int:
    """The time axis of the mask, which has the layout of the data."""
    return 0 if is_time_major(inputs) else 1


def own_keys(keys, names: tuple[str, ...]):
    """Random keys, typed or not, others for each device along these axes."""
    if not names:
        return keys
    fold_in = lambda key: jax.random.fold_in(key, jax.lax.axis_index(names))
    for _ in range(keys.ndim - (not is_key(keys))):
        fold_in = jax.vmap(fold_in)
    return fold_in(keys)


def of_first_device(y, names: tuple[str, ...]):
    """A result that all devices have, known to be the same on all of them."""
    return of_one_device(y, jax.lax.axis_index(names) == 0, names)


def of_one_device(y, is_chosen, names: tuple[str, ...]):
    """On all devices, the result of the only one for which `is_chosen`."""
    if is_key(y):
        data = of_one_device(jax.random.key_data(y), is_chosen, names)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(y))
    kept = jnp.where(is_chosen, y, jnp.zeros_like(y))
    is_bool = kept.dtype == jnp.bool_
    total = jax.lax.psum(kept.astype(jnp.int8) if is_bool else kept, names)
    return total.astype(jnp.bool_) if is_bool else total
