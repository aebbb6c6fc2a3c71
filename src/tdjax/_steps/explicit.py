"""Calls without `sharding` whose arguments are split over explicit mesh axes.

`jax.vmap` over an axis that the types split works as it is. What JAX refuses there is
to merge or slice a split axis, to gather from one, or to map a convolution. Then the
mesh axes that split batch and time are left to the compiler during the call, as on a
mesh with automatic axes: the results are those of one device, and split as the
arguments are.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdjax._checks import is_array
from tdjax._jaxprs import contains
from tdjax._mesh import (
    closures_explained,
    explicit_axes,
    mesh_of,
    names_in,
    only_axes,
    typed_spec,
)
from tdjax._steps.axes import (
    Axis,
    Inputs,
    batch_size,
    output_position,
    partition,
    position,
    step_shape,
)
from tdjax._steps.select_steps import is_time_major


class Split(NamedTuple):
    """The explicit mesh axes that split batch and time, and the size of the batch."""

    mesh: Any
    batch: tuple[str, ...]
    time: tuple[str, ...]
    batch_size: Any

    def spec(self, y, axis: Axis) -> PartitionSpec:
        """How a result is split: as the arguments, and as its own type says."""
        entries: list[Any] = [*typed_spec(y)]
        if isinstance(axis, int):
            time = output_position(axis, y.ndim)
            batch = 1 if time == 0 else 0
            entries[time] = self.time or None
            if y.ndim > 1 and y.shape[batch] == self.batch_size:
                entries[batch] = self.batch or None
        return PartitionSpec(*entries)


def run_as_types_say(
    run: Callable, args: Any, step: Callable, inputs: Inputs, mask, lowering, specs_of
) -> Any:
    """`run(args)`, with the help of the compiler where JAX can't do it otherwise.

    `step(mapped)` is a call on one step of the inputs, and `specs_of(results, split)`
    says how the results are split.
    """
    split = _split_of(inputs, mask)
    if split is None:
        return run(args)
    # The gradient of a convolution in a loop fails later than here.
    loops = getattr(lowering, "chosen", lowering).chunk_size is not None
    if _is_refused(run, args) or (loops and _has_convolution(step, inputs)):
        return _run_with_compiler(run, args, split, specs_of)
    return run(args)


def _split_of(inputs: Inputs, mask) -> Split | None:
    """How the types of the inputs say that they are split, or None."""
    arrays = [*inputs.mapped, *([mask] if is_array(mask) else [])]
    if not explicit_axes(mesh := mesh_of(arrays)):
        return None
    batch, time, size = (), (), None
    mask_axis = 0 if is_time_major(inputs) else 1
    for x, axis in zip(arrays, [*inputs.mapped_axes, mask_axis]):
        if not isinstance(axis, int) or x.ndim <= axis:
            continue
        spec = typed_spec(x)
        time = time or names_in(spec[axis])
        if x.ndim > 1:
            batch = batch or names_in(spec[1 if axis == 0 else 0])
            size = batch_size(x, axis)
    return Split(mesh, batch, time, size) if batch or time else None


def _is_refused(run: Callable, args: Any) -> bool:
    """Whether the call fails, perhaps for how its arguments are split."""
    arrays, rebuild = _typed_arrays(args)
    try:
        # What is to be said, the call itself says.
        with warnings.catch_warnings(action="ignore"):
            jax.eval_shape(lambda arrays: run(rebuild(arrays)), arrays)
    except Exception:
        return True  # Of other errors, the compiler's run raises them again.
    return False


def _has_convolution(step: Callable, inputs: Inputs) -> bool:
    pairs = zip(inputs.mapped, inputs.mapped_axes)
    shapes = [step_shape(x, position(axis)) for x, axis in pairs]
    try:
        program = jax.make_jaxpr(step)(shapes)
    except Exception:
        return False  # The call itself says what is wrong.
    return contains(program, "conv_general_dilated")


def _run_with_compiler(run: Callable, args: Any, split: Split, specs_of) -> Any:
    """`run(args)` with the axes of `split` left to the compiler."""
    arrays, rebuild = _typed_arrays(args)
    names = (*split.batch, *split.time)
    mesh = split.mesh.update_axis_types(dict.fromkeys(names, AxisType.Auto))

    def call(arrays):
        with jax.sharding.use_abstract_mesh(mesh):
            rest = explicit_axes(mesh)
            specs = [only_axes(typed_spec(x), rest, x.ndim) for x in arrays]
            inner = rebuild(map(jax.sharding.reshard, arrays, specs))
            results = jax.tree.map(jnp.asarray, run(inner))
            specs = specs_of(results, split)
        back = lambda y, spec: jax.sharding.reshard(y, NamedSharding(split.mesh, spec))
        return jax.tree.map(back, results, specs)

    with closures_explained("Without sharding, this call"):
        return jax.jit(call)(arrays)


def _typed_arrays(args: Any) -> tuple[list, Callable]:
    """The arrays whose types say how they are split, and `rebuild(arrays) -> args`."""
    return partition(args, [isinstance(x, jax.Array) for x in jax.tree.leaves(args)])
