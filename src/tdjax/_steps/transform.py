"""The transform: one function, applied to every step, under any lowering."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

from jax.sharding import PartitionSpec

from tdjax._checks import describe, refuse_module
from tdjax._steps.axes import Inputs, flatten_inputs, map_results
from tdjax._steps.explicit import run_as_types_say
from tdjax._steps.hints import add_hints
from tdjax._steps.lowering import Lowering
from tdjax._steps.mesh import check_sharding, run_on_mesh
from tdjax._steps.places import Place, Program, function_text, resolver_for, type_text
from tdjax._steps.select_steps import select_steps

P = ParamSpec("P")
R = TypeVar("R")
_NO_FUNCTION: Any = object()


@overload
def time_distributed(
    fun: Callable[P, R],
    *,
    in_axes: Any = 1,
    out_axes: Any = 1,
    method: Literal["vmap", "fold", "auto"] = "vmap",
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
    axis_name: Any = None,
    spmd_axis_name: Any = None,
    capacity: int | None = None,
    sharding: PartitionSpec | None = None,
) -> "Distributed[P, R]": ...


@overload
def time_distributed(
    *,
    in_axes: Any = 1,
    out_axes: Any = 1,
    method: Literal["vmap", "fold", "auto"] = "vmap",
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
    axis_name: Any = None,
    spmd_axis_name: Any = None,
    capacity: int | None = None,
    sharding: PartitionSpec | None = None,
) -> "Callable[[Callable[P, R]], Distributed[P, R]]": ...


def time_distributed(
    fun: Any = _NO_FUNCTION,
    *,
    in_axes: Any = 1,
    out_axes: Any = 1,
    method: Literal["vmap", "fold", "auto"] = "vmap",
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
    axis_name: Any = None,
    spmd_axis_name: Any = None,
    capacity: int | None = None,
    sharding: PartitionSpec | None = None,
) -> Any:
    """Applies `fun` to every time step, with the same parameters at each.

    For every step t, `y[:, t] = fun(x[:, t])`. Arguments and results are any pytrees.
    Time is axis 1 unless `in_axes` and `out_axes` say otherwise. Calls nest: each level
    takes one axis. Call the result under `jax.jit`: outside of it, a loop is compiled
    at each call. Compile time does not grow with the number of steps, except with
    `unroll=True`.

    `method="vmap"` is this definition, and the reference. `method="fold"` merges batch
    and time and calls `fun` once: often faster, but **wrong** where `fun` mixes the
    examples of a batch. `chunk_size` bounds the memory. `tdjax.autotune` measures which
    lowering is fastest. See docs/methods.md.

    Called with `mask`, bool, `(batch, time)` (`(time, batch)` for time-major data),
    masked steps give zeros and no gradient, even if they contain NaN or infinity
    (docs/masks.md). With `capacity` only valid steps are computed; like `"fold"`,
    this is wrong where `fun` mixes examples (docs/masks.md#packing).

    Args:
      fun: a function of pytrees of arrays. Keyword arguments of the call, except
        `mask`, are passed to it as they are. Without `fun` the result is a decorator:
        `@time_distributed(in_axes=0, out_axes=0)`.
      in_axes: the time axis of the positional arguments, as in `jax.vmap`: an int, None
        for what every step shares, or a tuple or other pytree prefix of these.
      out_axes: that of the results; None if a result does not depend on the step.
      method: `"vmap"`, `"fold"`, or `"auto"`: what the `tdjax.Tuning` in effect says,
        `chunk_size`, `unroll` and `remat` too; without one, what was measured for
        such a layer and device, by default `"vmap"` (docs/tuning.md).
      chunk_size: steps per block; None for all steps in one block. The last block may
        be shorter.
      unroll: blocks per iteration of the loop, as in `jax.lax.scan`, or True for
        straight-line code.
      remat: recompute a block's activations in the backward pass (`jax.checkpoint`).
      axis_name: a name for the time axis, for collectives over steps. It needs
        `method="vmap"` and all steps in one block.
      spmd_axis_name: the mesh axis that shards time, as in `jax.vmap`; needs `"vmap"`.
      capacity: compute the valid steps only, at most this many. Steps beyond the
        capacity become NaN (integers: the lowest or highest value).
      sharding: `P(batch, time)`, the mesh axes that split batch and time, on the mesh
        in context (`jax.set_mesh`). Each device runs `fun` on its own examples and
        steps, and `capacity` is that of one device (docs/mesh.md). None leaves the
        layout to the compiler.

    Returns:
      A function of the same arguments, each with a time axis, and of `mask`.

    Raises:
      TypeError: if an option or an argument is of the wrong kind; if `fun` is a Flax
        module, which needs `tdjax.linen` or `tdjax.nnx`.
      ValueError: if options contradict each other, if shapes do not fit `in_axes` or
        `mask`, or if a known mask has more valid steps than `capacity`; if `sharding`
        does not fit the mesh or the sizes.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
      >>> mask = tdjax.lengths_to_mask(jnp.array([4, 1]), 4)
      >>> y = apply(params, jnp.ones((2, 4, 3)), mask=mask)
      >>> y.shape, y[1, 1:].any().item()
      ((2, 4, 5), False)
    """
    lowering = Lowering(
        method, chunk_size, unroll, remat, axis_name, spmd_axis_name, capacity
    )
    check_sharding(sharding, lowering)
    options = {"in_axes": in_axes, "out_axes": out_axes, "lowering": lowering}
    distribute = functools.partial(_distribute, **options, sharding=sharding)
    return distribute if fun is _NO_FUNCTION else distribute(fun)


def _distribute(
    fun, /, in_axes, out_axes, lowering: Lowering, sharding: PartitionSpec | None
) -> "Distributed":
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {describe(fun)}.")
    refuse_module(fun)
    return Distributed(fun, in_axes, out_axes, lowering, sharding)


@dataclasses.dataclass(eq=False)
class Distributed(Generic[P, R]):
    """A function that `time_distributed` made, and what it was made of."""

    fun: Callable[P, R]
    in_axes: Any
    out_axes: Any
    lowering: Lowering
    sharding: PartitionSpec | None = None

    def __post_init__(self):
        # `updated=()`: the attributes of a callable object are not the wrapper's.
        functools.update_wrapper(self, self.fun, updated=())

    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __call__(self, /, *args: Any, mask: Any, **kwargs: Any) -> R: ...

    def __call__(self, /, *args: Any, mask: Any = None, **kwargs: Any) -> Any:
        resolver = resolver_for(self.lowering)
        if resolver is None:
            return self._call(args, kwargs, mask)
        run = lambda lowering: self._with(lowering)._call(args, kwargs, mask)
        keywords = kwargs if mask is None else {**kwargs, "mask": mask}
        return resolver.run(self.place(args, keywords), run)

    def _with(self, lowering: Lowering) -> "Distributed[P, R]":
        return dataclasses.replace(self, lowering=lowering)

    def place(self, args: tuple, kwargs: dict[str, Any]) -> Place:
        """What a resolver knows of a call."""
        text = functools.partial(function_text, self.fun)
        name, program = type_text(self.fun), lambda: Program(self._with)
        axes = self.in_axes, self.out_axes
        given = self.lowering, *axes, self.sharding
        return Place(name, self.fun, text, program, args, kwargs, *given)

    def _call(self, args: tuple, kwargs: dict, mask: Any) -> Any:
        if self.sharding is None:
            return self._run_as_types_say(args, kwargs, mask)
        options = self.in_axes, self.out_axes, self.lowering, self.sharding
        return run_on_mesh(self._run, args, kwargs, mask, *options)

    def _run_as_types_say(self, args: tuple, kwargs: dict, mask: Any) -> Any:
        inputs = flatten_inputs(args, self.in_axes)
        step = functools.partial(_call_on_mapped, self.fun, inputs, kwargs)
        return run_as_types_say(
            lambda everything: self._run(*everything),
            (args, kwargs, mask),
            step, inputs, mask, self.lowering,
            lambda y, split: map_results(split.spec, y, self.out_axes),
        )  # fmt: skip

    def _run(self, args: tuple, kwargs: dict, mask: Any) -> Any:
        inputs = flatten_inputs(args, self.in_axes)
        steps = select_steps(inputs, mask, self.lowering)
        call = functools.partial(_call_on_mapped, self.fun, steps.inputs, kwargs)
        try:
            return steps.run(call, self.out_axes, self.lowering)
        except Exception as error:
            add_hints(error, self.fun, args, kwargs, inputs, self.lowering)
            raise

    def __reduce__(self):
        """Pickles a decorated function by its name, others as what they are made of."""
        name = getattr(self, "__qualname__", "")
        module = sys.modules.get(getattr(self, "__module__", ""))
        if getattr(module, name, None) is self:
            return name
        fields = self.fun, self.in_axes, self.out_axes, self.lowering, self.sharding
        return Distributed, fields

    def __get__(self, instance, owner=None):
        """Binds as a function does, so that it can decorate a method."""
        return self if instance is None else functools.partial(self, instance)


def _call_on_mapped(fun, inputs: Inputs, kwargs, mapped):
    return fun(*inputs.rebuild(mapped), **kwargs)
