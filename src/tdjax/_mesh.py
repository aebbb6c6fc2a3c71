"""Meshes: what the options that name mesh axes have in common.

An *entry* of a `PartitionSpec` is the mesh axis, or the axes, that split one axis of an
array. `over_mesh` is the one place where a function is handed to the devices.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdjax._checks import describe, is_array

_AUTO = AxisType.Auto


def names_in(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def require_spec(name: str, value: Any, entries: int, meaning: str) -> list[Any]:
    """The entries of a `PartitionSpec`, filled up with None; each axis named once."""
    if not isinstance(value, PartitionSpec):
        raise TypeError(
            f"{name} must be a jax.sharding.PartitionSpec of {meaning}, such as "
            f"P('data'), got {describe(value)}."
        )
    given = [*value]
    are_names = [x is None or isinstance(x, str | tuple) for x in given]
    if len(given) > entries or not all(are_names):
        raise ValueError(
            f"{name} must name the mesh axes of {meaning}, and no more, got {value}."
        )
    names = [name for entry in given for name in names_in(entry)]
    if len({*names}) < len(names):
        raise ValueError(f"{name} must name each mesh axis once, got {value}.")
    return [*given, *[None] * (entries - len(given))]


def require_mesh(option: str, names: Iterable[str], arrays: list) -> Any:
    """The mesh in context, or of the arrays' types, which must have these axes."""
    mesh = mesh_of(arrays)
    if mesh is None:
        raise ValueError(
            f"{option} needs a mesh in context, got none. Call under "
            "`with jax.set_mesh(mesh):`."
        )
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(
                f"{option} must name axes of the mesh in context, which has "
                f"{mesh.axis_names}, got {name!r}."
            )
        if axis_type(mesh, name) == AxisType.Manual:
            raise ValueError(
                f"{option} names the axis {name!r}, over which a "
                "jax.shard_map around this call runs already. Leave it out: the "
                "arrays are those of one device."
            )
    return mesh


def mesh_of(arrays: list) -> Any:
    """The mesh in context, else that of the first type that has one, else None."""
    meshes = [jax.sharding.get_abstract_mesh(), *map(_mesh_of_type, arrays)]
    return next((mesh for mesh in meshes if mesh is not None and not mesh.empty), None)


def _mesh_of_type(x: Any) -> Any:
    return getattr(_typed_sharding(x), "mesh", None)


def _typed_sharding(x: Any) -> Any:
    return getattr(jax.typeof(x), "sharding", None) if is_array(x) else None


def axis_type(mesh, name: str) -> AxisType:
    """Whether an axis is the compiler's (Auto), in the types (Explicit), or Manual."""
    return dict(zip(mesh.axis_names, mesh.axis_types))[name]


def explicit_axes(mesh) -> set[str]:
    """The axes of the mesh that JAX keeps in types."""
    names = () if mesh is None else mesh.axis_names
    return {name for name in names if axis_type(mesh, name) == AxisType.Explicit}


def typed_spec(x: Any) -> PartitionSpec:
    """How the type of an array says that it is split; only explicit axes are there."""
    sharding = _typed_sharding(x)
    if sharding is None or sharding.mesh.empty:
        return PartitionSpec(*[None] * x.ndim)
    explicit = explicit_axes(sharding.mesh)
    return only_axes(PartitionSpec(*sharding.spec, *[None] * x.ndim), explicit, x.ndim)


def only_axes(spec: PartitionSpec, names: set[str], rank: int) -> PartitionSpec:
    """The first `rank` entries of a spec, without the other mesh axes."""
    entries = [tuple(n for n in names_in(entry) if n in names) for entry in spec]
    return PartitionSpec(*[entry or None for entry in entries[:rank]])


def reshard(arrays: list, specs: list, mesh) -> list:
    """The arrays as the specs say, where types have to say so."""
    explicit = explicit_axes(mesh)
    if not explicit:
        return arrays
    pairs = zip(arrays, specs)
    wanted = [only_axes(spec, explicit, x.ndim) for x, spec in pairs]
    return [reshard_typed(x, spec, mesh) for x, spec in zip(arrays, wanted)]


def reshard_typed(x: Any, spec: PartitionSpec, mesh) -> Any:
    """An array with this spec in its type; there need not be a mesh in context."""
    if typed_spec(x) == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def unsplit(x: Any) -> Any:
    """The whole array on each device, if its type says that it is split."""
    mesh = _mesh_of_type(x)
    whole = PartitionSpec(*[None] * x.ndim)
    return x if mesh is None or mesh.empty else reshard_typed(x, whole, mesh)


def like_type_of(x: Any, other: Any) -> Any:
    """`x`, split as the type of `other`, an array of the same shape, says."""
    if typed_spec(x) == typed_spec(other):
        return x
    return jax.sharding.reshard(x, _typed_sharding(other))


def constrain(arrays: list, specs: list, mesh) -> list:
    """Tells the compiler how the automatic axes split the arrays."""
    automatic = {name for name in mesh.axis_names if axis_type(mesh, name) == _AUTO}
    if not automatic:
        return arrays
    wanted = [only_axes(spec, automatic, x.ndim) for x, spec in zip(arrays, specs)]
    shardings = [NamedSharding(mesh, spec) for spec in wanted]
    return jax.lax.with_sharding_constraint(arrays, shardings)


def check_sizes(option: str, arrays: list, specs: list, mesh, padding: str) -> None:
    """Refuses sizes that the devices don't divide."""
    for x, spec in zip(arrays, specs):
        for axis, (size, entry) in enumerate(zip(x.shape, spec)):
            names = names_in(entry)
            devices = math.prod(mesh.shape[name] for name in names)
            if size % devices:
                raise ValueError(
                    f"{option} splits axis {axis} of {describe(x)} over {devices} "
                    f"devices ({', '.join(names)}), which must divide its size, got "
                    f"{size}. {padding}, or name other mesh axes."
                )


def over_mesh(call: Callable, mesh, names, in_specs: Any, out_specs: Any) -> Callable:
    """`call` on every device along these mesh axes; the other axes stay as they are."""
    # A user's loop may start with zeros, which are the same on every device: JAX would
    # refuse it with its default, check_vma=True.
    return jax.shard_map(
        call, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
        axis_names={*names}, check_vma=False,
    )  # fmt: skip


@contextlib.contextmanager
def closures_explained(what: str):
    """Adds to JAX's error what to do with arrays that a function closes over."""
    try:
        yield
    except ValueError as error:
        if "should match the aval mesh" in str(error):
            error.add_note(
                f"{what} runs fun with other kinds of mesh axes than around it, so it "
                "can't close over arrays that are split there. Pass them as arguments, "
                "None in in_axes."
            )
        raise


def refuse_varying(option: str, arrays: list) -> None:
    """Refuses what JAX can't differentiate here: it would leave out sums."""
    for x in arrays:
        if varying := varying_axes(x):
            raise ValueError(
                f"{option} inside of a jax.shard_map over other axes "
                f"({', '.join(varying)}): give that jax.shard_map check_vma=False."
            )


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` over which the type of `x` says that it varies."""
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # Up to JAX 0.9.
        return kind.vma
    return getattr(getattr(kind, "mat", None), "varying", frozenset())


def vary_together(tree: Any) -> Any:
    """The arrays, with the type of what varies over all the axes that one varies over.

    A loop's carry needs this under `check_vma=True`. The gradient of what was the same
    on all devices is then summed over them here, once.
    """
    everywhere = frozenset().union(*map(varying_axes, jax.tree.leaves(tree)))

    def vary(x):
        missing = everywhere - varying_axes(x)
        if not missing:
            return x
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying")

    return jax.tree.map(vary, tree)
