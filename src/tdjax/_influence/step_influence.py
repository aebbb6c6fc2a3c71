"""Which output step depends on which input step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from tdjax._checks import describe, require_array
from tdjax._influence.interpreter import evaluate
from tdjax._influence.spread import Spread, unknown
from tdjax._jaxprs import has_references


def step_influence(
    fun: Callable[[Any], Any], x: Any, *, bound: float = 1e6
) -> Bool[np.ndarray, "out_steps in_steps"]:
    """Says which output steps of `fun` depend on which input steps.

    The sparsity pattern of the Jacobian of `fun` is carried through its program, rule
    by rule, for all inputs of `x`'s shape and dtype at once (Griewank and Walther
    2008, "Evaluating Derivatives", chapter 7). No derivative is evaluated at a point,
    so a closed relu, a saturated gate or a masked step at `x` still counts as a path.
    Parameters and other constants enter with their values: a weight of zero is no
    path, nor is a constant mask.

    * **False is certain.** Input step j cannot change output step i, as long as the
      inputs and what is computed from them stay finite and within `bound`. The bound
      matters in comparisons, `max`, `min` and clipping: `x**2 > 2e6` is false within
      a bound of 1e6. Integers may have any value of their dtype.
    * **True is a path**: a chain of operations with non-zero coefficients. The output
      may still not depend on the input where paths cancel (`x - x`), where a value
      computed from `x` stays in a range (`relu(-x**2)`), behind an operation without
      a rule, for which every output depends on every input, or in a function that
      writes to arrays (`jax.new_ref`), all of whose outputs do.

    Args:
      fun: a function from `(batch, time, ...)` to `(batch, time, ...)` that JAX can
        trace. The number of steps may change. Random keys it closes over are constants.
      x: an example input `(batch, time, ...)`, or its `jax.ShapeDtypeStruct`; only its
        shape and dtype count. Small sizes give the same answer sooner.
      bound: floats computed from `x` are taken to stay within plus and minus this.
        Masks work because their constants lie far beyond it, such as -1e9 or
        `jnp.finfo(jnp.float32).min`. Give a smaller one for float16 (whose largest
        value is 65504) or for a mask of -1e4.

    Returns:
      A bool NumPy array `(out_steps, in_steps)`: `[i, j]` is whether output step i
      depends on input step j, for any example of the batch.

    Raises:
      TypeError: if `fun` is not callable, or its argument or result is not one array.
      ValueError: if one has fewer than two axes, or `bound` is not positive.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> tdjax.step_influence(lambda x: jnp.cumsum(x, axis=1), jnp.ones((1, 3, 2)))
      array([[ True, False, False],
             [ True,  True, False],
             [ True,  True,  True]])
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {describe(fun)}.")
    require_array("x", x, 2, "(batch, time, ...)")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}.")
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(x)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        raise TypeError(
            f"fun must return one array (batch, time, ...), got {type(shape).__name__}."
        )
    require_array("fun(x)", shape, 2, "(batch, time, ...)")
    if has_references(closed):
        return np.ones((shape.shape[1], x.shape[1]), bool)
    (y,) = evaluate(closed.jaxpr, closed.consts, [_every_input(x, bound)], bound)
    if not isinstance(y, Spread):
        return np.zeros((shape.shape[1], x.shape[1]), bool)
    others = tuple(axis for axis in range(y.steps.ndim) if axis not in (0, 2))
    return np.logical_or.reduce(y.steps, axis=others).T


def _every_input(x, bound: float) -> Spread:
    """All arrays like `x`, each element marked with its own step."""
    timesteps = x.shape[1]
    mark = jnp.eye(timesteps, dtype=bool)
    mark = mark.reshape(timesteps, 1, timesteps, *(1,) * (x.ndim - 2))
    steps = np.broadcast_to(mark, (timesteps, *x.shape))
    return unknown(x.dtype, steps, False, bound)
