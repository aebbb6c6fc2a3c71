"""Checks of arguments, and what their errors share."""

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def describe(value: Any) -> str:
    """An array as `float32[8,16]`, anything else as its type's name."""
    if not is_array(value):
        text = " ".join(repr(value).split())
        return f"{type(value).__name__} ({text:.80})"
    dtype = "float0" if value.dtype == jax.dtypes.float0 else value.dtype
    return f"{dtype}[{','.join(str(size) for size in value.shape)}]"


# Between the user's line and a warning are functions of these.
_NOT_THE_USERS = {
    "tdjax", "jax", "flax", "keras", "jaxtyping", "beartype", "contextlib", "functools"
}  # fmt: skip


def warn(message: str) -> None:
    """A `UserWarning` that shows the user's line."""
    frame, level = sys._getframe(1), 2
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in _NOT_THE_USERS:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def is_array(value: Any) -> bool:
    """Whether it has a shape and a dtype: arrays, tracers, `ShapeDtypeStruct`s."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_concrete(value: Any) -> bool:
    """Whether its values can be read now; inside `jit` they can't."""
    if not is_array(value) or isinstance(value, Tracer | jax.ShapeDtypeStruct):
        return False
    # This process may hold only a part of the array.
    return getattr(value, "is_fully_addressable", True)


def at_least_float32(dtype: Any) -> Any:
    """The dtype to sum floats of this dtype in: float32 for narrower ones."""
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return np.dtype(np.float32) if is_narrow else dtype


def clipped_int32(x: Any, least: int, most: int) -> Any:
    """Integers of any dtype as int32, clipped: a cast alone would wrap around."""
    info = jnp.iinfo(x.dtype)
    # JAX would cut NumPy's 64 bits to 32 at once.
    clip = np.clip if isinstance(x, np.ndarray) and info.bits == 64 else jnp.clip
    return jnp.asarray(clip(x, max(least, info.min), min(most, info.max)), jnp.int32)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, as errors show them: `['params']['kernel']`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def require_array(name: str, value: Any, min_rank: int, layout: str) -> None:
    """Refuses what is not an array of at least `min_rank` axes."""
    if not is_array(value):
        is_list = isinstance(value, list | tuple)
        hint = f" Pass jnp.asarray({name})." if is_list else ""
        raise TypeError(
            f"{name} must be an array {layout}, got {describe(value)}.{hint}"
        )
    if value.ndim < min_rank:
        raise ValueError(f"{name} must have shape {layout}, got {describe(value)}.")


NOT_STATIC = (
    "It must be known when the program is built: under jax.jit close over it, or name "
    "it in static_argnames."
)


def require_sizes(optional: bool = False, **values: Any) -> list[Any]:
    """The values as Python's ints, since NumPy's may wrap around; None if `optional`.

    Refuses bools, floats, zero and negative numbers.
    """
    for name, value in values.items():
        if optional and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            hint = f" {NOT_STATIC}" if is_array(value) else ""
            raise TypeError(
                f"{name} must be a positive int, got {describe(value)}.{hint}"
            )
        if value < 1:
            raise ValueError(f"{name} must be a positive int, got {value}.")
    return [None if value is None else int(value) for value in values.values()]


def require_params(
    params: Any, kernel_rank: int, kernel_layout: str, bias_layout: str
) -> tuple[Any, Any]:
    """Returns `(kernel, bias)` of a Dense-like parameter dict."""
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be a dict with 'kernel' and, if there is one, 'bias'; "
            f"got {describe(params)}."
        )
    if "kernel" not in params or set(params.keys()) - {"kernel", "bias"}:
        raise ValueError(
            "params must have the key 'kernel' and may have 'bias'; "
            f"got {sorted(params.keys())}."
        )
    kernel, bias = params["kernel"], params.get("bias")
    require_array("params['kernel']", kernel, kernel_rank, kernel_layout)
    if kernel.ndim != kernel_rank:
        raise ValueError(
            f"params['kernel'] must have shape {kernel_layout}, got {describe(kernel)}."
        )
    if bias is not None:
        require_array("params['bias']", bias, 1, bias_layout)
        expected = kernel.shape[:-2] + kernel.shape[-1:]
        if bias.shape != expected:
            raise ValueError(
                f"params['bias'] must have shape {bias_layout} = {expected} to go with "
                f"a kernel {describe(kernel)}, got {describe(bias)}."
            )
    return kernel, bias


# The base classes of layers, known by name: no framework is imported here.
_ADAPTERS = {
    ("flax.linen.module", "Module"): "tdjax.linen",
    ("flax.nnx.module", "Module"): "tdjax.nnx",
    ("keras.src.layers.layer", "Layer"): "tdjax.keras",
}


def adapter_of(layer: Any) -> str | None:
    """The adapter for a layer or a class of layers, None for anything else."""
    kind = layer if isinstance(layer, type) else type(layer)
    names = [(base.__module__, base.__name__) for base in kind.__mro__]
    return next((_ADAPTERS[name] for name in names if name in _ADAPTERS), None)


def is_method(layer: Any, name: str) -> bool:
    """Whether it is a public method of the layer's class, and no field of it."""
    member = inspect.getattr_static(type(layer), name, None)
    is_field = name in getattr(layer, "__dataclass_fields__", ())
    return inspect.isfunction(member) and not is_field and not name.startswith("_")


def refuse_module(fun: Any) -> None:
    """Refuses a layer as a function: its variables need an adapter."""
    adapter = adapter_of(fun)
    if adapter is not None:
        instance = f"({fun.__name__}(...))" if isinstance(fun, type) else ""
        raise TypeError(
            f"fun must be a function of arrays, got {describe(fun)}. Use "
            f"{adapter}.TimeDistributed{instance} for it."
        )


def require_layer(name: str, layer: Any, module_class: type, adapter: str) -> None:
    """Refuses what is not an instance of the adapter's module class."""
    if isinstance(layer, module_class):
        return
    home = adapter_of(layer)
    framework = adapter.removeprefix("tdjax.")
    if isinstance(layer, list | tuple):
        call = (
            "nnx.Sequential(*layers)" if framework == "nnx" else "nn.Sequential(layers)"
        )
        remedy = f"Make one layer of several with {call}."
    elif home == adapter:
        remedy = f"Give an instance, {layer.__name__}(...), in place of the class."
    elif home is not None:
        remedy = f"Use {home} for it."
    else:
        remedy = "Use tdjax.time_distributed for a function." * callable(layer)
    raise TypeError(
        f"{name} must be an instance of flax.{framework}.Module, got "
        f"{describe(layer)}. {remedy}".rstrip()
    )
