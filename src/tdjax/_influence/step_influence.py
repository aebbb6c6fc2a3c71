"""Which output step depends on which input step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool

from tdjax._checks import describe
from tdjax._influence.interpreter import evaluate
from tdjax._influence.spread import Spread, unknown
from tdjax._jaxprs import has_references
from tdjax._steps.axes import flatten_inputs, map_results, positive_axis, time_size


def step_influence(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 1,
    out_axes: Any = 1,
    bound: float = 1e6,
) -> Bool[np.ndarray, "out_steps in_steps"]:
    """Says which output steps of `fun` depend on which input steps.

    The sparsity pattern of the Jacobian of `fun` is carried through its program, rule
    by rule, for all inputs of these shapes and dtypes at once (Griewank and Walther
    2008, "Evaluating Derivatives", chapter 7). No derivative is evaluated at a point,
    so a closed relu, a saturated gate or a masked step still counts as a path.
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
      fun: a function of pytrees of arrays that JAX can trace: a layer, or a whole model
        `fun(params, batch)` with `argnums=1`. The number of steps may change. Random
        keys it closes over are constants.
      *args: example arguments. Small sizes give the same answer sooner. Of those at
        `argnums` only shapes and dtypes count, so a `jax.ShapeDtypeStruct` will do.
        Such a struct among the others stands for any values.
      argnums: the position of the argument whose steps vary, or of several.
      in_axes: their time axis: an int, a pytree prefix of the argument with None for
        arrays that have no time axis and are constants, or a tuple of these, one for
        each of several `argnums`.
      out_axes: that of the results, likewise; results with None are left out.
      bound: floats computed from the inputs are taken to stay within plus and minus
        this. Masks work because their constants lie far beyond it, such as -1e9 or
        `jnp.finfo(jnp.float32).min`. Give a smaller one for float16 (whose largest
        value is 65504) or for a mask of -1e4.

    Returns:
      A bool NumPy array `(out_steps, in_steps)`: `[i, j]` is whether output step i of
      any result depends on input step j of any argument, for any example of the batch.

    Raises:
      TypeError: if `fun` is not callable, or `argnums` is not an int or several.
      ValueError: if an array has no such axis, if arguments or results differ in their
        number of steps, or if `bound` is not positive.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> tdjax.step_influence(lambda x: jnp.cumsum(x, axis=1), jnp.ones((1, 3, 2)))
      array([[ True, False, False],
             [ True,  True, False],
             [ True,  True,  True]])
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {describe(fun)}.")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}.")
    inputs = flatten_inputs(args, _axes_of_all(args, argnums, in_axes))
    program, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    axes = _axes_of_results(shapes, out_axes)
    timesteps = time_size(inputs)
    influence = np.zeros((_out_steps(shapes, axes), timesteps), bool)
    if has_references(program):
        return ~influence
    pairs = zip(inputs.leaves, inputs.axes)
    values = [_value(x, axis, timesteps, bound) for x, axis in pairs]
    results = evaluate(program.jaxpr, program.consts, values, bound)
    for y, axis in zip(results, axes, strict=True):
        if axis is not None and isinstance(y, Spread):
            steps = np.moveaxis(y.steps, axis + 1, 1)
            influence |= steps.any(axis=tuple(range(2, steps.ndim))).T
    return influence


def assert_causal(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 1,
    out_axes: Any = 1,
    bound: float = 1e6,
) -> None:
    """Raises an error if an output step may depend on a later input step.

    For tests of decoders and of whatever is trained to predict the next step: a mask
    that is missing, or off by one, lets the answer leak in. See `step_influence`, which
    this calls with the same arguments, for what "may depend" means: no leak is certain,
    and a leak is a path in the program of `fun`.

    Args:
      fun, args, argnums, in_axes, out_axes, bound: as in `step_influence`.

    Raises:
      AssertionError: if there is a leak. It names the first two steps, counted from 0.
      ValueError: if inputs and outputs have different numbers of steps.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> tdjax.assert_causal(lambda x: jnp.cumsum(x, axis=1), jnp.ones((1, 3, 2)))
      >>> tdjax.assert_causal(lambda x: jnp.flip(x, axis=1), jnp.ones((1, 3, 2)))
      Traceback (most recent call last):
        ...
      AssertionError: fun must be causal, and output step 0 depends on input step 2 ...
    """
    options = {"argnums": argnums, "in_axes": in_axes, "out_axes": out_axes}
    influence = step_influence(fun, *args, **options, bound=bound)
    out_steps, in_steps = influence.shape
    if out_steps != in_steps:
        raise ValueError(
            "assert_causal compares equal numbers of steps, got a function of "
            f"{in_steps} steps that returns {out_steps}. Look at step_influence itself."
        )
    leaks = np.argwhere(np.triu(influence, 1))
    if len(leaks):
        (out_step, in_step), count = leaks[0], len(leaks)
        raise AssertionError(
            f"fun must be causal, and output step {out_step} depends on input step "
            f"{in_step} ({count} such pair{'s' * (count > 1)} among {in_steps} steps). "
            "tdjax.plot_step_influence(tdjax.step_influence(...)) shows all."
        )


def _axes_of_all(args: tuple, argnums: Any, in_axes: Any) -> tuple:
    """`in_axes` for every argument: None where the steps don't vary."""
    several = isinstance(argnums, Sequence)
    numbers = list(argnums) if several else [argnums]
    if not numbers or not all(isinstance(i, int | np.integer) for i in numbers):
        raise TypeError(f"argnums must be an int or several, got {argnums!r}.")
    if not all(-len(args) <= i < len(args) for i in numbers):
        raise ValueError(
            f"argnums must be positions among the {len(args)} argument(s), got "
            f"{argnums!r}."
        )
    if several and isinstance(in_axes, tuple | list):
        if len(in_axes) != len(numbers):
            raise ValueError(
                f"in_axes must have an entry for each of argnums={argnums!r}, got "
                f"{in_axes!r}."
            )
    else:
        in_axes = [in_axes] * len(numbers)
    axes: list[Any] = [None] * len(args)
    for i, axis in zip(numbers, in_axes):
        axes[i] = axis
    return tuple(axes)


def _axes_of_results(shapes: Any, out_axes: Any) -> list[Any]:
    """The time axis of every result, from the front; None for what is left out."""
    axes: list[Any] = []

    def add(leaf, axis):
        axes.append(positive_axis("a result of fun", leaf, axis))

    map_results(add, shapes, out_axes)
    return axes


def _out_steps(shapes: Any, axes: list[Any]) -> int:
    leaves = zip(jax.tree.leaves(shapes), axes, strict=True)
    with_time = [(x, axis) for x, axis in leaves if axis is not None]
    sizes = {x.shape[axis] for x, axis in with_time}
    if len(sizes) != 1:
        shown = "; ".join(f"{describe(x)} with time on axis {a}" for x, a in with_time)
        raise ValueError(
            f"the results of fun must have one number of steps, got {shown or 'none'}. "
            "Give None in out_axes to those that don't count."
        )
    return sizes.pop()


def _value(x: Any, axis: Any, timesteps: int, bound: float) -> Any:
    """All arrays like `x`, each element marked with its own step, or a constant."""
    if axis is None and not isinstance(x, jax.ShapeDtypeStruct | Tracer):
        return x
    steps = np.zeros((timesteps, *x.shape), bool)
    if axis is not None:
        mark = np.eye(timesteps, dtype=bool)
        mark = mark.reshape(timesteps, timesteps, *(1,) * (x.ndim - 1))
        np.moveaxis(steps, axis + 1, 1)[:] = mark
    return unknown(x.dtype, steps, False, bound)
