"""How the steps are compiled: the options, and the choice that follows from them.

`distribute` takes a function of one step and all steps' inputs. It makes a function of
one block of steps out of it (`_block`, or `_step_block` for one step) and calls this
once, or for block after block (`loops`). `method="vmap"` is the definition, and the
reference.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tdjax._checks import describe, is_array, is_concrete, require_sizes
from tdjax._jaxprs import bind, evaluate, open_program
from tdjax._steps.axes import (
    Axis,
    Inputs,
    PerStep,
    map_results,
    output_position,
    position,
    time_size,
)
from tdjax._steps.cpu_convolution import with_transposed_convolutions
from tdjax._steps.fold import (
    check_shapes,
    fold_block,
    in_haiku_transform,
    shapes_of,
)
from tdjax._steps.loops import compiled_loop, maybe_remat, straight_line
from tdjax._steps.rules import block_size

METHODS = ("vmap", "fold")
AUTO = "auto"  # Another of the methods and options, chosen at the call (`places`).


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How `y[:, t] = fun(x[:, t])` is compiled; the fields are `time_distributed`'s."""

    method: Literal["vmap", "fold", "auto"] = "vmap"
    chunk_size: int | None = None
    unroll: int | bool = 1
    remat: bool = False
    axis_name: Any = None
    spmd_axis_name: Any = None
    capacity: int | None = None

    def __post_init__(self):
        if self.method not in (*METHODS, AUTO):
            methods = (*METHODS, AUTO)
            raise ValueError(f"method must be one of {methods}, got {self.method!r}.")
        sizes = {"chunk_size": self.chunk_size, "capacity": self.capacity}
        for name, size in zip(sizes, require_sizes(**sizes, optional=True)):
            object.__setattr__(self, name, size)
        if not isinstance(self.unroll, bool):
            (unroll,) = require_sizes(unroll=self.unroll)
            object.__setattr__(self, "unroll", unroll)
        if not isinstance(self.remat, bool):
            raise TypeError(f"remat must be a bool, got {describe(self.remat)}.")
        self._check_names()
        self._check_auto()

    def _check_names(self):
        if self.axis_name is not None and self.chunk_size is not None:
            raise ValueError(
                f"axis_name={self.axis_name!r} lets fun see all steps at once; "
                f"chunk_size={self.chunk_size} must then be None."
            )
        names = {"axis_name": self.axis_name, "spmd_axis_name": self.spmd_axis_name}
        for name, value in names.items():
            if value is not None and self.method == "fold":
                raise ValueError(
                    f"{name}={value!r} names the axis that vmap maps over; it needs "
                    f"method='vmap', got method={self.method!r}."
                )
            if value is not None and self.capacity is not None:
                raise ValueError(
                    f"{name}={value!r} names the time axis, which capacity="
                    f"{self.capacity} replaces by the valid steps of all examples. "
                    "Give only one of the two."
                )

    def _check_auto(self):
        given = self.chunk_size, self.unroll, self.remat
        # Compared by their text: True == 1, and means another thing.
        if self.method == AUTO and repr(given) != repr((None, 1, False)):
            raise ValueError(
                "method='auto' chooses chunk_size, unroll and remat too, got "
                f"chunk_size={self.chunk_size}, unroll={self.unroll}, "
                f"remat={self.remat}. Leave them out, or give a method."
            )


@dataclasses.dataclass(frozen=True)
class OnPlatform(Lowering):
    """`"auto"` that is `chosen` where a program is compiled for `platform`."""

    platform: str = "cpu"
    chosen: Lowering = Lowering()


def distribute(call, inputs: Inputs, out_axes: Any, lowering: Lowering) -> Any:
    """Runs `call`, a function of the leaves that have a time axis, over all steps."""
    call = functools.partial(call_and_check, call, check_out_axis, out_axes)
    if lowering.method == AUTO:
        return _by_rules(call, inputs, out_axes, lowering)
    if lowering.method == "fold" or lowering.chunk_size is not None:
        _check_shared_results(call, inputs, out_axes)
    chunk, timesteps = lowering.chunk_size, time_size(inputs)
    # A symbolic size can't be compared; the loop takes any size.
    if chunk is None or (isinstance(timesteps, int) and timesteps <= chunk):
        block = _block(call, inputs, out_axes, lowering)
        y = maybe_remat(block, lowering.remat)(inputs.mapped)
    else:
        y = _loop(call, inputs, out_axes, chunk, lowering)
    if lowering.method == "fold":
        check_shapes(call, inputs, out_axes, y)
    return y


def _by_rules(call, inputs: Inputs, out_axes, lowering: Lowering) -> Any:
    """The results of all steps at once, or of what is faster on the platform."""
    whole = _block(call, inputs, out_axes, lowering)
    axes = jax.tree.leaves(out_axes, is_leaf=lambda node: node is None)
    timesteps = time_size(inputs)
    is_whole = lowering.axis_name is not None or None in axes
    # Outside of jit nothing is fused, and blocks are only more calls.
    is_whole = is_whole or all(map(is_concrete, inputs.mapped))
    if is_whole or in_haiku_transform() or not isinstance(timesteps, int):
        return whole(inputs.mapped)
    program, shapes = jax.make_jaxpr(whole, return_shape=True)(inputs.mapped)
    results = lambda leaves: jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    at_once = lambda *mapped: evaluate(*open_program(program), mapped, bind)
    if isinstance(lowering, OnPlatform):
        platform, chosen = lowering.platform, lowering.chosen
    else:
        platform, chunk = "cpu", block_size(program, timesteps)
        if chunk is None:
            return results(at_once(*inputs.mapped))
        chosen = Lowering(chunk_size=chunk, unroll=True)

    def faster(*mapped):
        some = inputs.with_mapped(mapped)
        return jax.tree.leaves(distribute(call, some, out_axes, chosen))

    by_platform = {platform: faster, "default": at_once}
    return results(jax.lax.platform_dependent(*inputs.mapped, **by_platform))


def call_and_check(call, check: Callable, out_axes, mapped):
    """`call(mapped)`, after `check(leaf, axis)` has accepted each of its results."""
    y = call(mapped)
    map_results(check, y, out_axes)
    return y


def check_out_axis(y, axis: Axis) -> None:
    """Refuses an axis that the results of one step can't be stacked on."""
    if not is_array(y) and not isinstance(y, bool | int | float | complex):
        raise TypeError(f"fun must return arrays, got {describe(y)}.")
    rank = jnp.ndim(y) + 1
    if isinstance(axis, int) and not -rank <= axis < rank:
        raise ValueError(
            f"out_axes must lie within the result's {rank} axes (time included), got "
            f"{axis} for a step's result {describe(jnp.asarray(y))}."
        )


def _check_shared_results(call, inputs: Inputs, out_axes) -> None:
    """Lets `vmap` refuse a result that is declared shared and depends on the step."""
    axes = jax.tree.leaves(out_axes, is_leaf=lambda node: node is None)
    if any(axis is None for axis in axes):
        reference = _block(call, inputs, out_axes, Lowering())
        shapes_of(reference, inputs.mapped)


def _block(call, inputs: Inputs, out_axes, lowering: Lowering) -> Callable:
    """A function of any number of steps at once."""
    if lowering.method == "fold":
        return fold_block(call, inputs.mapped_axes, out_axes)
    number = lambda axis: 0 if isinstance(axis, PerStep) else axis
    return jax.vmap(
        call,
        in_axes=([position(axis) for axis in inputs.mapped_axes],),
        out_axes=jax.tree.map(number, out_axes, is_leaf=lambda node: node is None),
        axis_name=lowering.axis_name,
        spmd_axis_name=lowering.spmd_axis_name,
    )


def _step_block(call, axes: list[Axis], out_axes) -> Callable:
    """A block of one step: drop the time axis, call, and put the axis back."""

    def restore(y, axis: Axis):
        if axis is None:
            return y
        return jnp.expand_dims(y, output_position(axis, jnp.ndim(y) + 1))

    def block(mapped):
        step = [jnp.squeeze(x, position(axis)) for x, axis in zip(mapped, axes)]
        return map_results(restore, call(step), out_axes)

    return block


def _loop(call, inputs: Inputs, out_axes, chunk: int, lowering: Lowering):
    """Runs blocks of `chunk` steps, one after the other."""
    unroll, timesteps = lowering.unroll, time_size(inputs)
    if not isinstance(timesteps, int) and (unroll is True or unroll > 1):
        raise ValueError(
            f"unroll={unroll} needs a known number of steps, got the symbolic size "
            f"{timesteps}. Use unroll=1."
        )
    if unroll is not True:
        call = with_transposed_convolutions(call)
    if chunk == 1:
        block = _step_block(call, inputs.mapped_axes, out_axes)
    else:
        block = _block(call, inputs, out_axes, lowering)
    if unroll is True:
        return straight_line(block, inputs, out_axes, chunk, lowering.remat)
    # False is 0, but `scan` takes numbers from 1.
    unroll = int(unroll) or 1
    return compiled_loop(block, inputs, out_axes, chunk, unroll, lowering.remat)
