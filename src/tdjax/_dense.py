"""The Dense family: one kernel for all steps, one per step, one for the sequence.

Each is a pure function of a parameter dict with Flax's names and shapes, so the
parameters of an `nn.Dense` can be used as they are:

| function         | kernel                      | output step t depends on |
| ---------------- | --------------------------- | ------------------------ |
| `dense`          | `(in, features)`            | input step t             |
| `per_step_dense` | `(T, in, features)`         | input step t             |
| `flatten_dense`  | `(T * in, T * features)`    | every input step         |
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, Shaped

from tdjax._checks import describe, require_array, require_params, require_sizes

Params = dict[str, Array]
Initializer = Callable[..., Any]

default_kernel_init = jax.nn.initializers.lecun_normal()
default_per_step_kernel_init = jax.nn.initializers.lecun_normal(batch_axis=0)
default_bias_init = jax.nn.initializers.zeros


def init_dense(
    key: PRNGKeyArray | Array,
    in_features: int,
    features: int,
    *,
    use_bias: bool = True,
    dtype: Any = jnp.float32,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
) -> Params:
    """Makes the parameters of `dense`.

    Args:
      key: a PRNG key.
      in_features, features: sizes of the last axis of input and output.
      use_bias: whether there is a bias.
      dtype: the dtype of the parameters.
      kernel_init, bias_init: as in `jax.nn.initializers`; by default those of Flax,
        LeCun normal and zeros.

    Returns:
      `{"kernel": (in_features, features), "bias": (features,)}`.

    Raises:
      TypeError, ValueError: if a size is not a positive int.

    Example:
      >>> import jax, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 10, 5)
      >>> sum(p.size for p in params.values())
      55
    """
    in_features, features = require_sizes(in_features=in_features, features=features)
    shape = (in_features, features)
    return _init(key, shape, use_bias, dtype, kernel_init, bias_init)


def init_flatten_dense(
    key: PRNGKeyArray | Array,
    timesteps: int,
    in_features: int,
    features: int,
    *,
    use_bias: bool = True,
    dtype: Any = jnp.float32,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
) -> Params:
    """Makes the parameters of `flatten_dense`.

    Args:
      timesteps: number of steps; the other arguments are those of `init_dense`.

    Returns:
      A dict of `kernel`, `(timesteps * in_features, timesteps * features)`, and `bias`,
      `(timesteps * features,)`.

    Raises:
      TypeError, ValueError: if a size is not a positive int.

    Example:
      >>> import jax, tdjax
      >>> params = tdjax.init_flatten_dense(jax.random.key(0), 4, 3, 5)
      >>> sum(p.size for p in params.values())
      260
    """
    timesteps, in_features, features = require_sizes(
        timesteps=timesteps, in_features=in_features, features=features
    )
    shape = (timesteps * in_features, timesteps * features)
    return _init(key, shape, use_bias, dtype, kernel_init, bias_init)


def init_per_step_dense(
    key: PRNGKeyArray | Array,
    timesteps: int,
    in_features: int,
    features: int,
    *,
    use_bias: bool = True,
    dtype: Any = jnp.float32,
    kernel_init: Initializer = default_per_step_kernel_init,
    bias_init: Initializer = default_bias_init,
) -> Params:
    """Makes the parameters of `per_step_dense`.

    Args:
      timesteps: number of steps; the other arguments are those of `init_dense`. By
        default each step's kernel starts as that of a `dense`.

    Returns:
      `{"kernel": (timesteps, in_features, features), "bias": (timesteps, features)}`.

    Raises:
      TypeError, ValueError: if a size is not a positive int.

    Example:
      >>> import jax, tdjax
      >>> params = tdjax.init_per_step_dense(jax.random.key(0), 4, 3, 5)
      >>> sum(p.size for p in params.values())
      80
    """
    timesteps, in_features, features = require_sizes(
        timesteps=timesteps, in_features=in_features, features=features
    )
    shape = (timesteps, in_features, features)
    return _init(key, shape, use_bias, dtype, kernel_init, bias_init)


def dense(
    params: Mapping[str, Any], x: Shaped[Array | np.ndarray, "*lead in_features"]
) -> Shaped[Array, "*lead features"]:
    """Multiplies the last axis by one kernel, the same at every step.

    All axes before the last are treated alike, so `dense(params, x)` is already
    distributed over time: `time_distributed(dense)` compiles to the same program. The
    result has the dtype that JAX promotes `x`, kernel and bias to.

    Args:
      params: `{"kernel": (in_features, features), "bias": (features,)}`; the bias
        may be absent or None.
      x: `(..., in_features)`, any rank from 1.

    Returns:
      `(..., features)`.

    Raises:
      TypeError, ValueError: if `params` or `x` is of the wrong kind or shape.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.array([0.0, 1.0])}
      >>> tdjax.dense(params, jnp.ones((8, 16, 3))).shape
      (8, 16, 2)
    """
    kernel, bias = require_params(params, 2, "(in_features, features)", "(features,)")
    require_array("x", x, 1, "(..., in_features)")
    _require_size("x", x, -1, "in_features", kernel.shape[0], kernel)
    return _add_bias(jnp.matmul(x, kernel), bias)


def flatten_dense(
    params: Mapping[str, Any],
    x: Shaped[Array | np.ndarray, "*lead timesteps in_features"],
) -> Shaped[Array, "*lead timesteps features"]:
    """Flattens time and features, multiplies by one kernel, and splits them again.

    Every output step depends on every input step. The kernel fixes the number of
    steps.

    Args:
      params: `{"kernel": (timesteps * in_features, timesteps * features),
        "bias": (timesteps * features,)}`; the bias is optional.
      x: `(..., timesteps, in_features)`, any rank from 2.

    Returns:
      `(..., timesteps, features)`.

    Raises:
      TypeError, ValueError: if `params` or `x` is of the wrong kind or shape.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_flatten_dense(jax.random.key(0), 4, 3, 5)
      >>> tdjax.flatten_dense(params, jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
    """
    kernel, _ = require_params(
        params, 2, "(timesteps * in_features, timesteps * features)", "(T * features,)"
    )
    require_array("x", x, 2, "(..., timesteps, in_features)")
    timesteps, in_features = x.shape[-2:]
    fits = timesteps and kernel.shape[0] == timesteps * in_features
    if not fits or kernel.shape[1] % timesteps:
        raise ValueError(
            f"x must have shape (..., timesteps, in_features) with timesteps * "
            f"in_features == {kernel.shape[0]} and timesteps a divisor of "
            f"{kernel.shape[1]} to go with params['kernel'] {describe(kernel)}, got "
            f"{describe(x)}. The number of steps is part of this layer: "
            "use dense for sequences of any length."
        )
    flat = jnp.reshape(x, (*x.shape[:-2], timesteps * in_features))
    y = dense(params, flat)
    return jnp.reshape(y, (*x.shape[:-1], kernel.shape[1] // timesteps))


def per_step_dense(
    params: Mapping[str, Any],
    x: Shaped[Array | np.ndarray, "*lead timesteps in_features"],
) -> Shaped[Array, "*lead timesteps features"]:
    """Multiplies each step by its own kernel.

    It is what `LocallyConnected1D` with kernel size 1 was in Keras 2.

    Args:
      params: `{"kernel": (timesteps, in_features, features),
        "bias": (timesteps, features)}`; the bias may be absent or None.
      x: `(..., timesteps, in_features)`, any rank from 2.

    Returns:
      `(..., timesteps, features)`.

    Raises:
      TypeError, ValueError: if `params` or `x` is of the wrong kind or shape.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_per_step_dense(jax.random.key(0), 4, 3, 5)
      >>> tdjax.per_step_dense(params, jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
    """
    kernel, bias = require_params(
        params, 3, "(timesteps, in_features, features)", "(timesteps, features)"
    )
    require_array("x", x, 2, "(..., timesteps, in_features)")
    _require_size("x", x, -2, "timesteps", kernel.shape[0], kernel)
    _require_size("x", x, -1, "in_features", kernel.shape[1], kernel)
    return _add_bias(jnp.einsum("...ti,tif->...tf", x, kernel), bias)


def as_per_step(params: Mapping[str, Any], timesteps: int) -> Params:
    """Turns `dense` parameters into `per_step_dense` ones of the same function.

    Args:
      params: parameters of `dense`.
      timesteps: number of steps.

    Returns:
      `{"kernel": (timesteps, in_features, features), "bias": (timesteps, features)}`,
      with equal slices for all steps.

    Raises:
      TypeError, ValueError: if `params` or `timesteps` is of the wrong kind or shape.

    Example:
      >>> import jax, tdjax
      >>> shared = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> tdjax.as_per_step(shared, 4)["kernel"].shape
      (4, 3, 5)
    """
    kernel, bias = require_params(params, 2, "(in_features, features)", "(features,)")
    (timesteps,) = require_sizes(timesteps=timesteps)
    repeat = lambda a: jnp.broadcast_to(a, (timesteps, *a.shape))
    return _as_params(repeat(kernel), None if bias is None else repeat(bias))


def as_flatten(params: Mapping[str, Any], timesteps: int) -> Params:
    """Turns `dense` or `per_step_dense` parameters into `flatten_dense` ones.

    The kernel is block diagonal with one block per step. For `dense` it is the
    Kronecker product of the identity and the kernel (Van Loan 2000, "The ubiquitous
    Kronecker product"). The other blocks are exact zeros, even where the kernel holds
    inf or NaN.

    Args:
      params: parameters of `dense` (kernel of rank 2) or `per_step_dense` (rank 3).
      timesteps: number of steps.

    Returns:
      A dict of `kernel`, `(timesteps * in_features, timesteps * features)`, and `bias`,
      `(timesteps * features,)`.

    Raises:
      TypeError, ValueError: if `params` or `timesteps` is of the wrong kind or shape.

    Example:
      >>> import jax, tdjax
      >>> shared = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> tdjax.as_flatten(shared, 4)["kernel"].shape
      (12, 20)
    """
    is_shared = isinstance(params, Mapping) and jnp.ndim(params.get("kernel", 0)) != 3
    per_step = as_per_step(params, timesteps) if is_shared else params
    kernel, bias = require_params(
        per_step, 3, "(timesteps, in_features, features)", "(timesteps, features)"
    )
    if kernel.shape[0] != timesteps:
        raise ValueError(
            f"timesteps must be {kernel.shape[0]} to go with params['kernel'] "
            f"{describe(kernel)}, got {timesteps}."
        )
    flat_bias = None if bias is None else jnp.reshape(bias, (-1,))
    return _as_params(_block_diagonal(kernel), flat_bias)


def _init(key, kernel_shape, use_bias, dtype, kernel_init, bias_init) -> Params:
    kernel_key, bias_key = jax.random.split(key)
    kernel = kernel_init(kernel_key, kernel_shape, dtype)
    bias_shape = kernel_shape[:-2] + kernel_shape[-1:]
    return _as_params(
        kernel, bias_init(bias_key, bias_shape, dtype) if use_bias else None
    )


def _as_params(kernel, bias) -> Params:
    return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}


def _add_bias(y, bias):
    if bias is None:
        return y
    # Of y's rank, as `jax_numpy_rank_promotion="raise"` wants it.
    return y + jnp.reshape(bias, (*[1] * (y.ndim - bias.ndim), *bias.shape))


def _block_diagonal(blocks):
    """(n, rows, columns) -> (n * rows, n * columns)."""
    n, rows, columns = blocks.shape
    diagonal = jnp.arange(n)
    grid = jnp.zeros((n, rows, n, columns), blocks.dtype)
    # The two index arrays stand apart, so the indexed axis moves to the front.
    grid = grid.at[diagonal, :, diagonal, :].set(blocks)
    return jnp.reshape(grid, (n * rows, n * columns))


def _require_size(name, x, axis, axis_name, size, kernel) -> None:
    if x.shape[axis] != size:
        raise ValueError(
            f"{name} must have {axis_name} = {size} on axis {axis} to go with "
            f"params['kernel'] {describe(kernel)}, got {describe(x)}."
        )
