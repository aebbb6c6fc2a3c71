"""Flax Linen: `TimeDistributed` for any layer, and the Dense family."""

import functools
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from flax.errors import CallCompactUnboundModuleError
from flax.linen.dtypes import promote_dtype
from jax.sharding import PartitionSpec

from tdjax._checks import (
    describe,
    is_method,
    require_array,
    require_layer,
)
from tdjax._cross_entropy.linen_head import CrossEntropyHead
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
from tdjax._linen_scopes import (
    adopt,
    call_layer,
    lift_one_step,
    lift_over_time,
    module_text,
    rename,
    require_variables,
    thaw,
    variables_by_itself,
    written_collections,
)
from tdjax._steps.mesh import check_sharding
from tdjax._steps.places import Place, Program, resolver_for
from tdjax._steps.stateful import check_carry, first_steps, make_lowering
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


class TimeDistributed(nn.Module):
    """Applies `layer` to every time step, with the same parameters at each.

    The variables are those of `layer`: the same tree, shapes and initial values as
    without the wrapper, so checkpoints fit both. A name belongs to `layer`, as in
    `TimeDistributed(nn.Dense(5, name="head"))`, and a layer that several modules share
    has one set of variables. Methods, axes and chunks are those of
    `tdjax.time_distributed`.

    Each step draws its own noise (docs/state.md#dropout-and-other-noise), and what
    `layer` writes to its variables is kept (docs/state.md). Called with `mask`, bool,
    `(batch, time)` (`(time, batch)` for time-major data), masked steps give zeros and
    no gradient (docs/masks.md); with `capacity` only valid steps are computed
    (docs/masks.md#packing).

    Attributes:
      layer: the module to apply, or one that is part of the surrounding module.
      in_axes, out_axes, method, chunk_size, unroll, remat, spmd_axis_name, capacity: as
        in `tdjax.time_distributed`.
      sharding: as in `tdjax.time_distributed`; see docs/mesh.md for the variables.
      axis_name: a name for the time axis, as `nn.BatchNorm(axis_name=...)` takes to
        normalise over all steps under `"vmap"`. `init` then calls `layer` with a time
        axis of one step.
      share_rng: whether all steps draw the same noise; needs `"vmap"`.
      variable_carry: the collections that go from step to step, as in `nn.scan`;
        `"batch_stats"` moves running statistics step by step, as Keras does. It needs
        `"vmap"`, without `axis_name` and `capacity`.

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
    method: Literal["vmap", "fold", "auto"] = "vmap"
    chunk_size: int | None = None
    unroll: int | bool = 1
    remat: bool = False
    axis_name: Any = None
    spmd_axis_name: Any = None
    share_rng: bool = False
    capacity: int | None = None
    variable_carry: Any = False
    sharding: PartitionSpec | None = None

    def __post_init__(self):
        layer = self.layer
        require_layer("layer", layer, nn.Module, "tdjax.linen")
        check_sharding(self.sharding, make_lowering(self))
        check_carry(self)
        # Linen would adopt `layer` and give it a scope below this one, with other names
        # and other initial values. So hide it until there is a scope to share.
        object.__setattr__(self, "layer", None)
        # Only a module that is made by itself has no parent yet; a copy has one.
        is_copy = isinstance(self.parent, nn.Module | Scope | None)
        if self.name is not None and layer.scope is not None and not is_copy:
            rename(_innermost(layer), self.name)
            object.__setattr__(self, "name", None)
        super().__post_init__()
        if self.scope is not None and layer.scope is None:
            layer = adopt(layer, self.scope)
        object.__setattr__(self, "layer", layer)

    def __call__(self, *args, mask=None, **kwargs):
        """Calls `layer` on every step; keyword arguments are shared by all steps."""
        return self._over_time("__call__", *args, mask=mask, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Another method of `layer`, over all steps, for `apply(..., method=name)`."""
        layer = self.__dict__.get("layer")
        is_nested = isinstance(layer, TimeDistributed) and hasattr(layer, name)
        if not (is_nested or is_method(layer, name)):
            return super().__getattr__(name)

        def method(self, *args, mask=None, **kwargs):
            return self._over_time(name, *args, mask=mask, **kwargs)

        return types.MethodType(method, self)

    @nn.nowrap
    def sow(self, col: str, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
        """As in Linen, under a name apart from what `layer` sows in the same scope."""
        is_shared = self.scope is not None and self.scope is self.layer.scope
        name = f"TimeDistributed.{name}" if is_shared else name
        return super().sow(col, name, value, *args, **kwargs)

    def _over_time(self, method: str, *args, mask, **kwargs):
        """Calls a method of `layer` on every step."""
        if self.scope is None:
            raise CallCompactUnboundModuleError()
        call = functools.partial(call_layer, method)
        functools.update_wrapper(call, call_layer)  # Flax asks for its name.
        if self.is_initializing():
            self._init_layer(call, *first_steps(args, thaw(self.in_axes)), **kwargs)

        def run(lowering):
            lift = nn.transforms.lift_transform
            over_time = lift(lift_over_time, call, self, lowering, mask, kwargs)
            return over_time(self.layer, *args)

        lowering = make_lowering(self)
        resolver = None if self.is_initializing() else resolver_for(lowering)
        if resolver is None:
            return run(lowering)
        keywords = kwargs if mask is None else {**kwargs, "mask": mask}
        return resolver.run(self._place(method, args, keywords, lowering), run)

    @nn.nowrap
    def _place(self, method: str, args: tuple, kwargs: dict, lowering) -> Place:
        """What a resolver knows of a call of this bound module."""
        owner = _innermost(self.layer)  # Of variables and of the name.
        scope: Any = owner.scope or self.scope
        variables = variables_by_itself(owner)

        def program() -> Program:
            layer, _ = self.layer.unbind()
            by_itself = self.clone(layer=layer, parent=None, name=None)
            rngs = {name: jax.random.key(0) for name in scope.rngs}
            options = {"rngs": rngs, "mutable": scope.mutable, "method": method}
            make = lambda lowering: by_itself.clone(**vars(lowering))
            of = lambda lowering: functools.partial(make(lowering).apply, **options)
            return Program(of, (variables,))

        written = written_collections(variables, scope.mutable)
        depends = lambda: (sorted(scope.rngs), str(jax.tree.structure(variables)))
        place = self._place_of(method, args, kwargs, lowering, program, written)
        name = ".".join(scope.path) or place.name
        return place._replace(name=name, depends=depends)

    @nn.nowrap
    def _place_of(self, method, args, kwargs, lowering, program, written) -> Place:
        name, layer = type(self.layer).__name__, self.layer
        text = functools.partial(module_text, layer)
        axes = thaw(self.in_axes), thaw(self.out_axes)
        fixed = method, self.share_rng, self.variable_carry, *written
        given = lowering, *axes, self.sharding, fixed
        return Place(name, layer, text, program, args, kwargs, *given)

    def _init_layer(self, call, *args, **kwargs):
        """Makes the variables by one plain call, as without a wrapper."""
        if self.axis_name is not None:
            # The layer may need the name: give it a time axis of one step.
            lift = nn.transforms.lift_transform
            call = lift(lift_one_step, call, self.axis_name)
        call(self.layer, *args, **kwargs)


def _innermost(layer: nn.Module) -> nn.Module:
    """The layer inside of wrappers, which owns the name."""
    while isinstance(layer, TimeDistributed):
        layer = layer.layer
    return layer


class _SequenceDense(nn.Module):
    """The fields and parameters of `FlattenDense` and `PerStepDense`."""

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
    `(timesteps * features,)`. The first input fixes the number of steps.

    Attributes:
      features: output features of each step.
      use_bias, dtype, param_dtype, kernel_init, bias_init: as in `nn.Dense`.

    Raises:
      TypeError, ValueError: if `features` is not a positive int, or the input has other
        steps or features than the kernel.

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
    """Dense with separate weights for each step.

    Parameters: `kernel` `(timesteps, in_features, features)` and `bias`
    `(timesteps, features)`. The first input fixes the number of steps.

    Attributes and errors are those of `FlattenDense`. By default each step's kernel
    starts as that of an `nn.Dense`.

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
    compiler_options: Sequence[Mapping[str, Any]] = (),
    cache: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Tuning[Any]:
    """Finds the fastest lowerings of a layer, or of a whole model, for these inputs.

    It measures `module.apply(variables, *args, ...)` as `tdjax.autotune` does. A layer
    with dropout in training draws other noise under `"fold"`, which is then refused.

    Of a model with `TimeDistributed` inside, each is tuned on the arrays that reach it,
    and then the model is measured as it was given and tuned. See docs/tuning.md.

    Args:
      module: a `TimeDistributed`, a model with any number of them inside, or a layer
        for one step, to be wrapped in one.
      variables: its variables, from `init` or from training.
      *args: the inputs of a call.
      rngs, mutable: as in `apply`.
      argnums, budget, memory_limit, tolerance, candidates, compiler_options, cache: as
        in `tdjax.autotune`; `argnums` counts `variables` as 0.
      **kwargs: keyword arguments of the call, such as `mask`.

    Returns:
      A `tdjax.Tuning`; `.tuned` is the module with the best options. Of a model it is
      one of a subclass that uses the options of `.places`, for the measured shapes.

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
    require_layer("module", module, nn.Module, "tdjax.linen")
    require_variables(variables)
    module = untuned(module)
    limits = budget, memory_limit, tolerance
    settings = Settings(argnums, *limits, candidates, cache, compiler_options)
    is_wrapped = isinstance(module, TimeDistributed)
    over_time = module if is_wrapped else TimeDistributed(module)
    refuse_lowering(type(over_time.layer).__call__, kwargs)
    make = lambda lowering: over_time.clone(**vars(lowering))
    options = {"rngs": rngs, "mutable": mutable}

    def call(variables, *args):
        return module.apply(variables, *args, **options, **kwargs)

    def tune_layer():
        of = lambda lowering: functools.partial(make(lowering).apply, **options)
        given = make_lowering(over_time), lambda: Program(of, (variables,))
        written = written_collections(variables, mutable)
        place = over_time._place_of("__call__", args, kwargs, *given, written)
        return tune(place, make, settings)

    if is_wrapped:
        return tune_layer()
    tuned = functools.partial(in_tuning, module, nn.Module)
    model = Model(type(module).__name__, call, (variables, *args), tuned)
    return tune_model_or_layer(model, tune_layer, settings)
