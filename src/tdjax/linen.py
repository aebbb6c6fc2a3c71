"""Flax Linen modules: any layer over time, and the Dense family."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import CallCompactUnboundModuleError
from flax.linen.dtypes import promote_dtype

from tdjax._checks import describe, require_array
from tdjax._dense import (
    Initializer,
    default_bias_init,
    default_kernel_init,
    default_per_step_kernel_init,
    flatten_dense,
    init_flatten_dense,
    init_per_step_dense,
    per_step_dense,
)
from tdjax._linen_scopes import adopt, call_layer, lift_one_step, lift_over_time, thaw
from tdjax._steps.stateful import first_steps, make_lowering
from tdjax._tuning.autotune import Subject, tune
from tdjax._tuning.result import Tuning
from tdjax._tuning.settings import Settings

__all__ = ["FlattenDense", "PerStepDense", "TimeDistributed", "autotune"]


def __dir__() -> list[str]:
    return __all__


class TimeDistributed(nn.Module):
    """Applies `layer` to every time step, with the same parameters at each.

    The variables are those of `layer`, no more: the same tree, shapes and initial
    values as without the wrapper, so checkpoints go from one to the other. So a name
    belongs to `layer`, as in `TimeDistributed(nn.Dense(5, name="head"))`, and a layer
    that several modules share has one set of variables. Methods, axes and chunks are
    those of `tdjax.time_distributed`.

    * **Randomness**: each step draws its own noise from each stream (dropout), or all
      steps the same with `share_rng=True` (only with `method="vmap"`).
    * **State**: what `layer` writes to variables is kept. `batch_stats` work under
      every method: `"vmap"` normalises each step by its own statistics over the batch
      and moves the running ones by the mean over steps; `"fold"` normalises by
      statistics over batch and time together; with `chunk_size`, over batch and the
      chunk's steps. Integer state is the last step's. What `layer` sows is stacked,
      time first.
    * **Carried state**: each step starts with what the step before has written to the
      collections of `variable_carry`: `"batch_stats"` for running statistics that move
      step after step, as in Keras. Only what depends on them runs in a loop. It needs
      `method="vmap"`.
    * **Masks**: the call takes `mask`, bool, `(batch, time)`: zeros at masked steps and
      no gradient, as in `tdjax.time_distributed`. Steps that no example has don't move
      running statistics. A layer that mixes the examples of a batch, as `BatchNorm` in
      training, sees copies of a valid step at the masked ones; wrap a module that takes
      the mask as an input, one slice a step, and hands it on: `def __call__(self, x,
      mask)`, called with `(x, mask, mask=mask)`. What is sown is zero where masked.
    * **Packing**: with `capacity=n` the layer computes the valid steps only. It must
      treat examples independently; one that writes statistics is refused. What is sown
      is that of the packed steps, `(n, ...)`.

    Attributes:
      layer: the module to apply, or one that is already part of the surrounding module.
      in_axes: the time axis of the positional arguments of the call.
      out_axes: the time axis of the results.
      method: `"vmap"` or `"fold"`.
      chunk_size: steps per block, or None for all in one.
      unroll: how the loop over blocks is compiled, if there is more than one.
      remat: recompute activations in the backward pass.
      axis_name: a name for the time axis, as `nn.BatchNorm(axis_name=...)` takes to
        normalise over all steps with `method="vmap"`. `init` calls `layer` with a time
        axis of one step.
      spmd_axis_name: the mesh axis over which time is sharded.
      share_rng: whether all steps draw the same noise.
      capacity: compute the valid steps only, at most so many.
      variable_carry: the collections that go from step to step, as in `nn.scan`.

    Raises:
      TypeError: if `layer` is not a Linen module.
      ValueError: as `tdjax.time_distributed`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tdjax
      >>> model = tdjax.linen.TimeDistributed(nn.Dense(5))
      >>> x = jnp.ones((2, 50, 10))
      >>> variables = model.init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (5,), 'kernel': (10, 5)}
      >>> model.apply(variables, x).shape
      (2, 50, 5)
    """

    layer: nn.Module
    in_axes: Any = 1
    out_axes: Any = 1
    method: Literal["vmap", "fold"] = "vmap"
    chunk_size: int | None = None
    unroll: int | bool = 1
    remat: bool = False
    axis_name: Any = None
    spmd_axis_name: Any = None
    share_rng: bool = False
    capacity: int | None = None
    variable_carry: Any = False

    def __post_init__(self):
        layer = self.layer
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"layer must be a flax.linen.Module, got {describe(layer)}. Use "
                "tdjax.time_distributed for a function."
            )
        make_lowering(self)
        _check_carry(self)
        # Linen would give `layer` a scope of its own below this one, with other names
        # and other initial values. Hide it until there is a scope to share; a module
        # with a name is not adopted.
        object.__setattr__(self, "layer", None)
        super().__post_init__()
        if self.scope is not None and layer.scope is None:
            layer = adopt(layer, self.scope)
        object.__setattr__(self, "layer", layer)

    def __call__(self, *args, mask=None, **kwargs):
        """Calls `layer` on every step; keyword arguments are shared by all steps.

        With `mask`, bool, `(batch, time)`, masked steps give zeros.
        """
        if self.scope is None:
            raise CallCompactUnboundModuleError()
        if self.is_initializing():
            self._init_layer(*first_steps(args, thaw(self.in_axes)), **kwargs)
        lift = nn.transforms.lift_transform
        over_time = lift(lift_over_time, call_layer, self, mask, kwargs)
        return over_time(self.layer, *args)

    def _init_layer(self, *args, **kwargs):
        """One plain call makes the variables as they are without a wrapper."""
        call = call_layer
        if self.axis_name is not None:
            # The layer may need the name: give it a time axis of one step.
            lift = nn.transforms.lift_transform
            call = lift(lift_one_step, call_layer, self.axis_name)
        call(self.layer, *args, **kwargs)


def _check_carry(options: TimeDistributed) -> None:
    carry = options.variable_carry
    if not carry:
        return
    for name, needed in {"method": "vmap", "axis_name": None, "capacity": None}.items():
        if (given := getattr(options, name)) != needed:
            raise ValueError(
                f"variable_carry={carry!r} takes state from step to step, so it needs "
                f"{name}={needed!r}, got {given!r}."
            )


class _SequenceDense(nn.Module):
    """What the layers over whole sequences share: their fields and parameters."""

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init

    def _apply(self, init, apply, x):
        require_array("x", x, 2, "(..., timesteps, in_features)")
        sizes = (*x.shape[-2:], self.features)
        make = functools.partial(init, use_bias=self.use_bias)
        shapes = jax.eval_shape(lambda key: make(key, *sizes), jax.random.key(0))
        self._check_size(x, shapes["kernel"].shape)
        params = {"kernel": self._param("kernel", self.kernel_init, shapes)}
        if self.use_bias:
            params["bias"] = self._param("bias", self.bias_init, shapes)
        x, *values = promote_dtype(x, *params.values(), dtype=self.dtype)
        return apply(dict(zip(params, values)), x)

    def _check_size(self, x, shape):
        kernel = nn.unbox(self.variables.get("params", {}).get("kernel"))
        if kernel is not None and kernel.shape != shape:
            raise ValueError(
                f"x must have the timesteps and in_features that params['kernel'] "
                f"{describe(kernel)} was made for, got {describe(x)}, which needs a "
                f"kernel of shape {shape}."
            )

    def _param(self, name, init, shapes):
        return self.param(name, init, shapes[name].shape, self.param_dtype)


class FlattenDense(_SequenceDense):
    """Dense over time and features together: every step sees every step.

    Parameters: `kernel` `(timesteps * in_features, timesteps * features)` and `bias`
    `(timesteps * features,)`. The number of steps is fixed by the first input. See
    `tdjax.flatten_dense`.

    Attributes:
      features: output features of each step.
      use_bias: whether there is a bias.
      dtype: dtype of the computation, by default that of JAX's promotion of input and
        parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.

    Raises:
      TypeError: if `features` is not an int.
      ValueError: if the input is not `(..., timesteps, in_features)` with the steps and
        features of the kernel.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> model = tdjax.linen.FlattenDense(5)
      >>> params = model.init(jax.random.key(0), jnp.ones((2, 4, 3)))["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (20,), 'kernel': (12, 20)}
    """

    @nn.compact
    def __call__(self, x):
        """`(..., timesteps, in_features)` -> `(..., timesteps, features)`."""
        return self._apply(init_flatten_dense, flatten_dense, x)


class PerStepDense(_SequenceDense):
    """Dense with weights of its own for each step.

    Parameters: `kernel` `(timesteps, in_features, features)` and `bias`
    `(timesteps, features)`. The number of steps is fixed by the first input. See
    `tdjax.per_step_dense`.

    Attributes:
      features: output features of each step.
      use_bias: whether there is a bias.
      dtype: dtype of the computation, by default that of JAX's promotion of input and
        parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel; by default each step's is what `nn.Dense`
        would have.
      bias_init: initializer of the bias.

    Raises:
      TypeError: if `features` is not an int.
      ValueError: if the input is not `(..., timesteps, in_features)` with the steps and
        features of the kernel.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> model = tdjax.linen.PerStepDense(5)
      >>> params = model.init(jax.random.key(0), jnp.ones((2, 4, 3)))["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (4, 5), 'kernel': (4, 3, 5)}
    """

    kernel_init: Initializer = default_per_step_kernel_init

    @nn.compact
    def __call__(self, x):
        """`(..., timesteps, in_features)` -> `(..., timesteps, features)`."""
        return self._apply(init_per_step_dense, per_step_dense, x)


def autotune(
    module: nn.Module,
    variables: Any,
    *args: Any,
    rngs: Any = None,
    mutable: Any = False,
    argnums: int | Sequence[int] | None = None,
    budget: int | float = 30.0,
    memory_limit: int | None = None,
    tolerance: int | float | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    cache: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Tuning:
    """Finds the fastest lowering of a `TimeDistributed` for these inputs.

    What is measured is `module.apply(variables, *args, ...)`; `tdjax.autotune` says
    how. A lowering under which the layer gives other numbers is refused: `"fold"` for a
    layer with dropout in training, say, which then draws other noise.

    Args:
      module: a `TimeDistributed`, or a layer to wrap in one.
      variables: its variables, from `init` or from training.
      *args: the inputs of a call.
      rngs: as in `apply`.
      mutable: as in `apply`.
      argnums: as in `tdjax.autotune`, counting `variables` as 0.
      budget: as in `tdjax.autotune`, as are all below.
      memory_limit: bytes of temporary memory.
      tolerance: the largest deviation from the reference.
      candidates: the options to try instead of the default list.
      cache: a folder that keeps results.
      **kwargs: keyword arguments of the call, such as `mask`.

    Returns:
      A `tdjax.Tuning`; `.tuned` is the module with the best options.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: as `tdjax.autotune`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tdjax
      >>> model, x = tdjax.linen.TimeDistributed(nn.Dense(5)), jnp.ones((2, 4, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> result = tdjax.linen.autotune(model, variables, x, budget=1)
      >>> result.tuned.apply(variables, x).shape
      (2, 4, 5)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an instance of flax.linen.Module, got {describe(module)}."
        )
    is_wrapped = isinstance(module, TimeDistributed)
    over_time = module if is_wrapped else TimeDistributed(module)
    make = lambda lowering: over_time.clone(**vars(lowering))

    def program(lowering):
        apply = make(lowering).apply
        return lambda variables, *args: apply(
            variables, *args, rngs=rngs, mutable=mutable, **kwargs
        )

    base, in_axes = make_lowering(over_time), thaw(over_time.in_axes)
    subject = Subject(base, in_axes, make, program, (variables,))
    settings = Settings(argnums, budget, memory_limit, tolerance, candidates, cache)
    return tune(subject, args, settings)
