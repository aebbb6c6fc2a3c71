"""Flax NNX: `TimeDistributed` for any layer, and the Dense family."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tdjax._checks import (
    describe,
    is_method,
    require_array,
    require_layer,
    require_sizes,
)
from tdjax._cross_entropy.nnx_head import CrossEntropyHead
from tdjax._dense import (
    Initializer,
    default_bias_init,
    flatten_dense,
    init_flatten_dense,
    init_per_step_dense,
    per_step_dense,
)
from tdjax._nnx_state import (
    changed,
    check_filter,
    is_in,
    module_text,
    refuse_new_attributes,
    refuse_rngs,
    set_paths,
    static_attributes,
)
from tdjax._steps.hints import explained
from tdjax._steps.lowering import Lowering
from tdjax._steps.mesh import check_sharding
from tdjax._steps.mesh_layers import distribute_layer
from tdjax._steps.places import Place, Program, resolver_for
from tdjax._steps.stateful import LayerState, check_carry, make_lowering
from tdjax._tuning.autotune import tune
from tdjax._tuning.model import Model, tune_model_or_layer
from tdjax._tuning.result import Tuning
from tdjax._tuning.settings import Settings, refuse_lowering
from tdjax._tuning.tuned import in_tuning, untuned

__all__ = [
    "CrossEntropyHead",
    "FlattenDense",
    "PerStepDense",
    "TimeDistributed",
    "autotune",
]

# Tracebacks, pickles and documentation name the place where users find it.
CrossEntropyHead.__module__ = __name__


def __dir__() -> list[str]:
    return __all__


class TimeDistributed(nnx.Module):
    """Applies `layer` to every time step, with the same parameters at each.

    `layer` is kept by reference, with its variables; methods, axes and chunks are those
    of `tdjax.time_distributed`. It can be called any number of times, under `nnx.jit`
    or not, in training and in inference.

    Each step draws its own noise from the streams that `layer` holds
    (docs/state.md#dropout-and-other-noise), and what `layer` writes to its variables is
    kept (docs/state.md), except to parameters. Called with `mask`, bool, `(batch,
    time)` (`(time, batch)` for time-major data), masked steps give zeros and no
    gradient (docs/masks.md); with `capacity` only valid steps are computed
    (docs/masks.md#packing).

    Args:
      layer: the module to apply.
      in_axes, out_axes, method, chunk_size, unroll, remat, spmd_axis_name, capacity: as
        in `tdjax.time_distributed`.
      sharding: as in `tdjax.time_distributed`; see docs/mesh.md for the variables.
      axis_name: a name for the time axis, as `nnx.BatchNorm(axis_name=...)` takes to
        normalise over all steps under `"vmap"`.
      share_rng: whether all steps draw the same noise; needs `"vmap"`.
      variable_carry: a filter of the variables that go from step to step;
        `nnx.BatchStat` moves running statistics step by step, as Keras does. It needs
        `"vmap"`, without `axis_name` and `capacity`.

    Raises:
      TypeError: if `layer` is not an NNX module, if a call is given an `nnx.Rngs`, or
        if `layer` changes a number, a string or None among its attributes.
      ValueError: as `tdjax.time_distributed`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> from flax import nnx
      >>> model = tdjax.nnx.TimeDistributed(nnx.Linear(10, 5, rngs=nnx.Rngs(0)))
      >>> model(jnp.ones((2, 50, 10))).shape
      (2, 50, 5)
    """

    def __init__(
        self,
        layer: nnx.Module,
        *,
        in_axes: Any = 1,
        out_axes: Any = 1,
        method: Literal["vmap", "fold", "auto"] = "vmap",
        chunk_size: int | None = None,
        unroll: int | bool = 1,
        remat: bool = False,
        axis_name: Any = None,
        spmd_axis_name: Any = None,
        share_rng: bool = False,
        capacity: int | None = None,
        variable_carry: Any = False,
        sharding: PartitionSpec | None = None,
    ):
        require_layer("layer", layer, nnx.Module, "tdjax.nnx")
        self.layer = layer
        self.in_axes, self.out_axes = in_axes, out_axes
        self.method, self.chunk_size, self.unroll = method, chunk_size, unroll
        self.remat, self.share_rng = remat, share_rng
        self.axis_name, self.spmd_axis_name = axis_name, spmd_axis_name
        is_list = isinstance(variable_carry, list)  # NNX hashes what is no variable.
        self.variable_carry = tuple(variable_carry) if is_list else variable_carry
        self.capacity = capacity
        self.sharding = sharding
        check_sharding(sharding, make_lowering(self))
        check_filter(variable_carry)
        check_carry(self)

    def __call__(self, *args, mask=None, **kwargs):
        """Calls `layer` on every step; keyword arguments are shared by all steps."""
        return self._over_time("__call__", *args, mask=mask, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Another method of `layer`, over all steps."""
        layer = vars(self).get("layer")
        is_nested = isinstance(layer, TimeDistributed) and hasattr(layer, name)
        if not (is_nested or is_method(layer, name)):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return functools.partial(self._over_time, name)

    def _over_time(self, method: str, *args, mask=None, **kwargs):
        """Calls a method of `layer` on every step."""
        refuse_rngs(args, kwargs)
        run = functools.partial(self._run, method, args, mask, kwargs)
        lowering = make_lowering(self)
        resolver = resolver_for(lowering)
        if resolver is None:
            return run(lowering)
        keywords = kwargs if mask is None else {**kwargs, "mask": mask}
        return resolver.run(self._place(method, args, keywords), run)

    def _place(self, method: str, args: tuple, kwargs: dict) -> Place:
        """What a resolver knows of a call."""
        text = functools.partial(module_text, self.layer)
        name, program = type(self.layer).__name__, lambda: _program(self, method)
        axes = self.in_axes, self.out_axes
        fixed = method, self.share_rng, self.variable_carry
        given = make_lowering(self), *axes, self.sharding, fixed
        return Place(name, self.layer, text, program, args, kwargs, *given)

    def _run(self, method: str, args: tuple, mask, kwargs: dict, lowering: Lowering):
        graphdef, keys, params, state = nnx.split(
            self.layer, nnx.RngKey, nnx.Param, ...
        )

        def step(shared, state, keys, *args):
            params, kwargs = shared
            # Rebuilt, the variables belong to the trace that writes to them.
            parts = jax.tree.map(lambda leaf: leaf, (params, state))
            layer = nnx.merge(graphdef, keys, *parts)
            attributes = static_attributes(layer)
            with explained(args):
                y = getattr(layer, method)(*args, **kwargs)
            refuse_new_attributes(attributes, static_attributes(layer))
            return y, nnx.split(layer, nnx.RngKey, nnx.Param, ...)[3]

        y, after = distribute_layer(
            step,
            (params, kwargs),
            LayerState(state, keys, self.share_rng, is_in(state, self.variable_carry)),
            args,
            mask,
            self.in_axes,
            self.out_axes,
            lowering,
            self.sharding,
        )
        nnx.update(self.layer, changed(state, after))
        return y


class _SequenceDense(nnx.Module):
    """What `FlattenDense` and `PerStepDense` share; they bring the functions."""

    _init: Callable[..., Any]
    _apply: Callable[..., Any]

    def __init__(
        self,
        timesteps: int,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
    ):
        (out_features,) = require_sizes(out_features=out_features)
        options = {} if kernel_init is None else {"kernel_init": kernel_init}
        params = type(self)._init(
            rngs.params(),
            timesteps,
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=param_dtype,
            bias_init=bias_init,
            **options,
        )
        self.timesteps = timesteps
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.param_dtype, self.use_bias = dtype, param_dtype, use_bias
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if use_bias else None

    # Python's errors about arguments show this name; the class is private.
    __init__.__qualname__ = "__init__"

    def __call__(self, x):
        """`(..., timesteps, in_features)` -> `(..., timesteps, out_features)`."""
        require_array("x", x, 2, "(..., timesteps, in_features)")
        if x.shape[-2:] != (self.timesteps, self.in_features):
            raise ValueError(
                f"x must have timesteps = {self.timesteps} on axis -2 and in_features "
                f"= {self.in_features} on axis -1, got {describe(x)}."
            )
        params = {"kernel": self.kernel[...]}
        if self.bias is not None:
            params["bias"] = self.bias[...]
        if self.dtype is not None:
            x, params = jax.tree.map(lambda a: jnp.asarray(a, self.dtype), (x, params))
        return type(self)._apply(params, x)


class FlattenDense(_SequenceDense):
    """Dense over time and features together: every step sees every step.

    Parameters: `kernel` `(timesteps * in_features, timesteps * out_features)` and
    `bias` `(timesteps * out_features,)`, or None without one. See
    `tdjax.flatten_dense`.

    Args:
      timesteps: number of steps.
      in_features, out_features: input and output features of each step.
      use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in `nnx.Linear`.

    Raises:
      TypeError, ValueError: if a size is not a positive int, or the input of a call is
        not `(..., timesteps, in_features)`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> from flax import nnx
      >>> model = tdjax.nnx.FlattenDense(4, 3, 5, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
    """

    _init = staticmethod(init_flatten_dense)
    _apply = staticmethod(flatten_dense)


class PerStepDense(_SequenceDense):
    """Dense with separate weights for each step.

    Parameters: `kernel` `(timesteps, in_features, out_features)` and `bias`
    `(timesteps, out_features)`, or None without one. See `tdjax.per_step_dense`.

    Arguments and errors are those of `FlattenDense`. By default each step's kernel
    starts as that of an `nnx.Linear`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> from flax import nnx
      >>> model = tdjax.nnx.PerStepDense(4, 3, 5, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
    """

    _init = staticmethod(init_per_step_dense)
    _apply = staticmethod(per_step_dense)


def autotune(
    module: nnx.Module,
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    budget: int | float = 30.0,
    memory_limit: int | None = None,
    tolerance: int | float | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    compiler_options: Sequence[Mapping[str, Any]] = (),
    cache: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Tuning[Any]:
    """Finds the fastest lowerings of a layer, or of a whole model, for these inputs.

    It measures `module(*args, **kwargs)` under `jax.jit` as `tdjax.autotune` does, in
    the mode that the module is in, and leaves its variables as they are. A lowering
    that writes other numbers to variables is refused too.

    Of a model with `TimeDistributed` inside, each is tuned on the arrays that reach it,
    and then the model is measured as it was given and tuned. See docs/tuning.md.

    Args:
      module: a `TimeDistributed`, a model with any number of them inside, or a layer
        for one step, to be wrapped in one.
      *args: the inputs of a call.
      argnums, budget, memory_limit, tolerance, candidates, compiler_options, cache: as
        in `tdjax.autotune`; `argnums` counts `module` as 0.
      **kwargs: keyword arguments of the call, such as `mask`.

    Returns:
      A `tdjax.Tuning`; `.tuned` is a `TimeDistributed` with the best options around
      the same layer. Of a model it is one with the same variables, of a subclass that
      uses the options of `.places`, for the measured shapes.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: as `tdjax.autotune`.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> from flax import nnx
      >>> layer, x = nnx.Linear(3, 5, rngs=nnx.Rngs(0)), jnp.ones((2, 4, 3))
      >>> result = tdjax.nnx.autotune(layer, x, budget=1)
      >>> result.tuned(x).shape
      (2, 4, 5)
    """
    require_layer("module", module, nnx.Module, "tdjax.nnx")
    limits = budget, memory_limit, tolerance
    settings = Settings(argnums, *limits, candidates, cache, compiler_options)
    is_wrapped = type(module) is TimeDistributed  # A subclass may do more.
    over_time = module if is_wrapped else TimeDistributed(module)
    refuse_lowering(type(over_time.layer).__call__, kwargs)
    graphdef, state = nnx.split(untuned(module))
    paths = dict[int, str]()

    def call(state, *args):
        # Rebuilt from leaves, the variables belong to the trace that writes them.
        model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        set_paths(paths, model, TimeDistributed)
        return model(*args, **kwargs), nnx.state(model, nnx.Not(nnx.Param))

    make = functools.partial(_with_lowering, over_time, over_time.layer)
    tune_layer = lambda: tune(
        over_time._place("__call__", args, kwargs), make, settings
    )
    if is_wrapped:
        return tune_layer()
    tuned = functools.partial(in_tuning, untuned(module), nnx.Module)
    model = Model(type(module).__name__, call, (state, *args), tuned, paths)
    return tune_model_or_layer(model, tune_layer, settings)


def _program(module: TimeDistributed, method: str) -> Program:
    """The calls of a module as a function of the state of its layer."""
    graphdef, state = nnx.split(module.layer)

    def of(lowering):
        def call(state, *args, **kwargs):
            # Rebuilt from leaves, the variables belong to the trace that writes them.
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
            over_time = _with_lowering(module, layer, lowering)
            y = over_time._over_time(method, *args, **kwargs)
            return y, nnx.state(layer, nnx.Not(nnx.Param))

        return call

    return Program(of, (state,))


def _with_lowering(module: TimeDistributed, layer, lowering) -> TimeDistributed:
    """`module` around `layer`, with another lowering."""
    kept = {
        name: getattr(module, name)
        for name in ("in_axes", "out_axes", "share_rng", "variable_carry", "sharding")
    }
    return TimeDistributed(layer, **kept, **vars(lowering))
