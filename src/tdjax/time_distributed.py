"""The transform: one function, applied to every step, whatever the lowering."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from tdjax._axes import Inputs, flatten_inputs
from tdjax._checks import describe, refuse_mask, refuse_module
from tdjax._lowering import Lowering, distribute


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

    Compile time does not grow with the number of steps, except under `unroll=True`.
    Call it under `jax.jit`: as with `jax.lax.map`, a loop outside of `jit` is compiled
    at each call.

    Args:
      fun: a function of positional arguments that are pytrees of arrays. Keyword
        arguments of the call reach it unchanged and are shared by all steps; `mask`
        is reserved.
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

    Returns:
      A function of the same arguments with a time axis in each.

    Raises:
      TypeError: if an option or an argument is of the wrong kind; if `fun` is a Flax
        module, for which there are `tdjax.linen` and `tdjax.nnx`.
      ValueError: if options contradict each other, or shapes do not fit `in_axes`; both
        are raised before anything is computed.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
      >>> apply(params, jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {describe(fun)}.")
    refuse_module(fun)
    lowering = Lowering(method, chunk_size, unroll, remat, axis_name, spmd_axis_name)

    # `updated=()`: a module object's attributes are not the wrapper's.
    @functools.wraps(fun, updated=())
    def distributed(*args, **kwargs):
        refuse_mask(kwargs)
        inputs = flatten_inputs(args, in_axes)
        call = functools.partial(_call_on_mapped, fun, inputs, kwargs)
        return distribute(call, inputs, out_axes, lowering)

    return distributed


def _call_on_mapped(fun, inputs: Inputs, kwargs, mapped):
    return fun(*inputs.rebuild(mapped), **kwargs)
