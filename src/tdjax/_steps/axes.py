"""Time axes of pytrees: prefixes, positions, slices, and the merging of blocks."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax._checks import describe, is_array


class PerStep(enum.Enum):
    """The time axis of what adapters add: time first, and no batch axis behind it.

    Random keys go in and layer state comes out this way. `vmap` maps it as axis 0.
    `fold` calls the function once per block: it passes in the block's first entry,
    and copies what comes out to every step of the block.
    """

    PER_STEP = "PER_STEP"
    # For results that may have a batch axis: `fold` then splits it.
    PER_STEP_OR_BATCH = "PER_STEP_OR_BATCH"


PER_STEP, PER_STEP_OR_BATCH = PerStep
Axis = int | None | PerStep

_SHARE = (
    "Give it None in in_axes if every step shares it: in_axes=(None, 1) shares the "
    "first of two arguments."
)


class Inputs(NamedTuple):
    """Positional arguments, flattened, with the time axis of each leaf."""

    leaves: list[Any]
    axes: list[Axis]
    treedef: Any

    @property
    def mapped(self) -> list[Any]:
        return [x for x, axis in zip(self.leaves, self.axes) if axis is not None]

    @property
    def mapped_axes(self) -> list[Axis]:
        return [axis for axis in self.axes if axis is not None]

    def replace(self, change: Callable) -> "Inputs":
        """The inputs with `change(leaf, axis) -> (leaf, axis)` applied to each leaf."""
        leaves, axes = zip(*map(change, self.leaves, self.axes))
        return Inputs([*leaves], [*axes], self.treedef)

    def with_mapped(self, mapped) -> "Inputs":
        """The inputs with other leaves in place of those that have a time axis."""
        mapped = iter(mapped)
        change = lambda x, axis: (x if axis is None else next(mapped), axis)
        return self.replace(change)

    def rebuild(self, mapped) -> Any:
        """The arguments, with `mapped` in place of the leaves that have a time axis."""
        mapped = iter(mapped)
        leaves = [
            x if axis is None else next(mapped)
            for x, axis in zip(self.leaves, self.axes)
        ]
        return jax.tree.unflatten(self.treedef, leaves)


def partition(tree: Any, chosen: list[bool]) -> tuple[list[Any], Callable]:
    """Some leaves, and `rebuild(leaves)`: the tree with others in their places."""
    leaves, treedef = jax.tree.flatten(tree)

    def rebuild(others) -> Any:
        others = iter(others)
        pairs = zip(leaves, chosen)
        return treedef.unflatten([next(others) if c else x for x, c in pairs])

    return [x for x, is_chosen in zip(leaves, chosen) if is_chosen], rebuild


def flatten_inputs(args: tuple, in_axes: Any) -> Inputs:
    """Pairs each leaf of `args` with its time axis, and checks that the leaf has it."""
    if not args:
        raise ValueError(
            "in_axes must give at least one positional argument an axis to map over, "
            "got no positional argument. Keyword arguments are shared by all steps."
        )
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(
            f"in_axes must have an entry for each positional argument: got {in_axes} "
            f"for {len(args)} argument(s)."
        )
    axes = broadcast_axes("in_axes", in_axes, args, "the positional arguments")
    paths, treedef = jax.tree_util.tree_flatten_with_path(args)
    names = ["args" + jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    axes = list(map(positive_axis, names, leaves, axes))
    _check_same_timesteps(names, leaves, axes)
    return Inputs(leaves, axes, treedef)


def broadcast_axes(name: str, prefix: Any, tree: Any, tree_name: str) -> list[Axis]:
    """One axis for each leaf of `tree`, from a pytree prefix."""
    axes: list[Axis] = []

    def repeat(axis, subtree):
        _check_axis(name, axis)
        axes.extend([axis] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(repeat, prefix, tree, is_leaf=lambda node: node is None)
    except ValueError as error:
        raise ValueError(
            f"{name} must be an int, None, or a pytree prefix of {tree_name}: got "
            f"{prefix} for the structure {jax.tree.structure(tree)}."
        ) from error
    return axes


def map_results(change: Callable, results: Any, out_axes: Any) -> Any:
    """Maps `change(leaf, axis)` over results, with axes from a pytree prefix."""
    axes = broadcast_axes("out_axes", out_axes, results, "the results")
    leaves, treedef = jax.tree.flatten(results)
    return jax.tree.unflatten(treedef, map(change, leaves, axes))


def positive_axis(name: str, x: Any, axis: Axis) -> Axis:
    """The axis counted from the front, after checking that `x` has it."""
    if not isinstance(axis, int):
        return axis
    if not is_array(x):
        raise TypeError(
            f"{name} is mapped over axis {axis} and must be an array, got "
            f"{describe(x)}. Convert numbers and lists of them with jnp.asarray. "
            f"{_SHARE}"
        )
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{name} is mapped over axis {axis} and must have that axis, got "
            f"{describe(x)}. {_SHARE} One sequence without a batch, (time, ...), has "
            "in_axes=0 and out_axes=0."
        )
    return axis % x.ndim


def time_size(inputs: Inputs) -> Any:
    """The number of steps; `flatten_inputs` has checked that all inputs agree."""
    return inputs.mapped[0].shape[position(inputs.mapped_axes[0])]


def step_shape(x, axis: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one step, without the time axis."""
    return jax.ShapeDtypeStruct((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)


def batch_size(x, axis: int) -> Any:
    """The size of axis 0 without the time axis."""
    return x.shape[1 if axis == 0 else 0]


def position(axis: Axis) -> int:
    """The axis as a number; what goes per step has time first."""
    return axis if isinstance(axis, int) else 0


def output_position(axis: Axis, rank: int) -> int:
    """Where time is in a result that has `rank` axes, time included."""
    return position(axis) % rank


def batch_first(x, axis: int):
    """(batch, time, ...), from an array with time on `axis`."""
    return jnp.moveaxis(x, axis, 1)


def time_back(x, axis: int):
    """The inverse of `batch_first`."""
    return jnp.moveaxis(x, 1, axis)


def slice_steps(x, axis: Axis, start, stop):
    """The steps from `start` to `stop`; the time axis stays."""
    return jax.lax.slice_in_dim(x, start, stop, axis=position(axis))


def first_step(x, axis: Axis):
    """The first step, without the time axis; zeros if there are no steps."""
    axis = position(axis)
    if x.shape[axis] == 0:
        return jnp.zeros((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)
    return jax.lax.index_in_dim(x, 0, axis, keepdims=False)


def blocks_first(x, axis: Axis, size: int):
    """(..., n * size, ...) -> (n, ..., size, ...)."""
    axis = position(axis)
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.reshape(x, shape), axis, 0)


def join_blocks(x, axis: Axis):
    """(n, ..., size, ...) -> (..., n * size, ...); of a shared result, the first."""
    if axis is None:
        return x[0]
    axis = output_position(axis, x.ndim - 1)
    x = jnp.moveaxis(x, 0, axis)
    steps = x.shape[axis] * x.shape[axis + 1]
    return jnp.reshape(x, (*x.shape[:axis], steps, *x.shape[axis + 2 :]))


def concatenate_blocks(blocks: list, axis: Axis):
    """Blocks one after the other in time; of a shared result, the first."""
    if axis is None:
        return blocks[0]
    return jnp.concatenate(blocks, output_position(axis, blocks[0].ndim))


def _check_axis(name: str, axis: Any) -> None:
    allowed = isinstance(axis, int | PerStep) or axis is None
    if isinstance(axis, bool) or not allowed:
        raise TypeError(f"{name} must hold ints and None only, got {describe(axis)}.")


def _check_same_timesteps(names, leaves, axes) -> None:
    """Refuses different sizes; the error names the first array of each size."""
    arrays: dict[Any, str] = {}
    for name, x, axis in zip(names, leaves, axes):
        if axis is not None:
            size = x.shape[position(axis)]
            text = f"{name} {describe(x)} has {size} on axis {position(axis)}"
            arrays.setdefault(size, text)
    if not arrays:
        raise ValueError(
            "in_axes must give at least one array an axis to map over; got None for "
            "every argument, or arguments without arrays."
        )
    if len(arrays) > 1:
        raise ValueError(
            f"in_axes must point at time axes of one size, got different sizes: "
            f"{'; '.join(arrays.values())}. Give None in in_axes to what every step "
            "shares: in_axes=(None, 1) shares the first of two arguments."
        )
