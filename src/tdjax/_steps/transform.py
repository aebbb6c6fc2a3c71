"""The transform: one function, applied to every step, whatever the lowering."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from tdjax._checks import describe, refuse_module
from tdjax._steps.axes import Inputs, flatten_inputs
from tdjax._steps.lowering import Lowering
from tdjax._steps.masked import select_steps


def time_distributed(
    fun: Callable[..., Any],
    *,
    in_axes: Any = 1,
    out_axes: Any = 1,
    method: Literal["vmap", "fold"] = "vmap",
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
    axis_name: Any = None,
    spmd_axis_name: Any = None,
    capacity: int | None = None,
) -> Callable[..., Any]:
    """Applies `fun` to every time step, with the same parameters at each.

    For every step t, `y[:, t] = fun(x[:, t])`. Arguments and results are any pytrees.
    Axis 1 is time unless `in_axes` and `out_axes` say otherwise; time-major data has
    axis 0. Calls nest: each level takes one axis.

    Which lowering is fastest depends on `fun` and on the device; `autotune` measures:

    * `method="vmap"` is the definition above, and the reference for all others. For a
      convolution JAX moves time in front of the batch and merges the two, so the first
      convolution of `fun` starts with a transposed copy of its input and the result of
      the last is copied back; between them it runs the same program as `"fold"`. The
      two copies are what it can lose.
    * `method="fold"` merges batch and time into one axis with a reshape, calls `fun`
      once on `(batch * time, ...)` and splits the result. It is right where `fun`
      treats examples independently, and **wrong** where `fun` mixes the batch (a
      mean over the batch, batch normalisation by batch statistics). The batch is axis
      0 of what `fun` sees: axis 0 of an array whose time axis is 1, axis 1 of a
      time-major one. Arrays that `in_axes` marks as shared (None) reach `fun` whole,
      so they must have no batch axis.
    * `chunk_size` steps go through `method` at once, block after block, which bounds
      the memory. The blocks run in a compiled loop (`jax.lax.scan`), or one after the
      other in straight-line code with `unroll=True`. On a CPU, `fun`'s convolutions
      are written differently in a compiled loop, so that XLA has no slow gradients
      for them there (jax-ml/jax issue 12868). With `chunk_size=1` the steps are
      sliced and `fun` is called on each as it is.

    **Masks.** Called with `mask`, bool, `(batch, time)` whatever the time axis of the
    arguments, it gives zeros at the steps where the mask is False, and no gradient
    flows from or to them, even where the input there is NaN or infinite: in place of
    their numbers `fun` sees those of a valid step. The batch is axis 0 of what `fun`
    sees and returns, as for `"fold"`, and every argument with a time axis must have one
    (or be `(time,)`). If `fun` wants the mask too, give it as an argument as well:
    `time_distributed(fun)(x, mask, mask=mask)` calls `fun(x[:, t], mask[:, t])`.
    Collectives over `axis_name` see all steps.

    **Packing.** With `capacity=n` the valid steps alone are computed, so the cost
    follows `n` and not the padded size: they are gathered, in the order of the mask, as
    `n` steps of a batch of one, and the results are put back. `method`, `chunk_size`
    and the like are about these steps. It is right where `fun` treats examples
    independently; shared arguments (None in `in_axes`) must have no batch axis. If
    there are more valid steps than `n`, it is an error when the mask is known while
    tracing. Otherwise those after the first `n` are marked in the result: floats are
    NaN, and so are a loss made of them and its gradient; signed integers are the lowest
    of their dtype, unsigned ones the highest, and bools are refused. `mask.sum() > n`
    tells beforehand.

    Compile time does not grow with the number of steps, except under `unroll=True`.
    Call it under `jax.jit`: as with `jax.lax.map`, a loop outside of `jit` is compiled
    at each call.

    Args:
      fun: a function of positional arguments that are pytrees of arrays. Keyword
        arguments of the call reach it unchanged and are shared by all steps, all but
        `mask`.
      in_axes: the time axis of the positional arguments, as in `jax.vmap`: an int, None
        for an argument that all steps share, or a pytree prefix (a tuple with an entry
        for each argument).
      out_axes: the time axis of the results, likewise. None is for a result that does
        not depend on the step.
      method: how a block of steps is lowered, `"vmap"` or `"fold"`.
      chunk_size: steps in a block; None for all steps in one. A shorter last block is
        no error.
      unroll: how the loop over blocks is compiled, as in `jax.lax.scan`: a number of
        blocks in each iteration, or True for straight-line code. One block has no loop.
      remat: keep no activations inside a block for the backward pass; compute them
        again (`jax.checkpoint`). On a CPU this saves memory in a compiled loop; in
        straight-line code XLA finds the two computations equal and keeps one.
      axis_name: a name for the time axis, so that `fun` can use collectives over steps.
        Only with `method="vmap"` and all steps in one block.
      spmd_axis_name: the mesh axis over which time is sharded, as in `jax.vmap`. Only
        with `method="vmap"`.
      capacity: compute the valid steps only, at most so many; see above.

    Returns:
      A function of the same arguments with a time axis in each, and of `mask`.

    Raises:
      TypeError: if an option or an argument is of the wrong kind; if `fun` is a Flax
        module, for which there are `tdjax.linen` and `tdjax.nnx`.
      ValueError: if options contradict each other, or shapes do not fit `in_axes` or
        `mask`, or `mask` is known and has more valid steps than `capacity`; all are
        raised before anything is computed.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
      >>> apply(params, jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
      >>> mask = tdjax.lengths_to_mask(jnp.array([4, 1]), 4)
      >>> packed = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), capacity=5)
      >>> packed(params, jnp.ones((2, 4, 3)), mask=mask)[1, 1:].any().item()
      False
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {describe(fun)}.")
    refuse_module(fun)
    lowering = Lowering(
        method, chunk_size, unroll, remat, axis_name, spmd_axis_name, capacity
    )

    return Distributed(fun, in_axes, out_axes, lowering)


@dataclasses.dataclass(eq=False)
class Distributed:
    """A function that `time_distributed` made, and what it was made of."""

    fun: Callable[..., Any]
    in_axes: Any
    out_axes: Any
    lowering: Lowering

    def __post_init__(self):
        # `updated=()`: the attributes of a callable object are not the wrapper's.
        functools.update_wrapper(self, self.fun, updated=())

    def __call__(self, /, *args, mask=None, **kwargs):
        steps = select_steps(flatten_inputs(args, self.in_axes), mask, self.lowering)
        call = functools.partial(_call_on_mapped, self.fun, steps.inputs, kwargs)
        return steps.run(call, self.out_axes, self.lowering)

    def __get__(self, instance, owner=None):
        """Binds as a function does, so that it can decorate a method."""
        return self if instance is None else functools.partial(self, instance)


def _call_on_mapped(fun, inputs: Inputs, kwargs, mapped):
    return fun(*inputs.rebuild(mapped), **kwargs)
