"""The softmax head that users pass: dicts of arrays, NNX modules and their states."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import adapter_of, at_least_float32, describe, require_array
from tdjax._cross_entropy.products import weight_name

LAYOUTS = {"kernel": "(features, words)", "embedding": "(words, features)"}
_WANTED = (
    "params must have the key 'kernel', as of a Dense layer, or 'embedding', as of an "
    "Embed, and may have 'bias'; got "
)


def require_head(params: Any, hidden: Any, labels: Any) -> tuple[dict[str, Any], Any]:
    """`(params, hidden)` of one dtype, after checking that they match."""
    arrays, dtype = _arrays_of(params)
    name = next(iter(arrays))
    weight, bias = arrays[name], arrays.get("bias")
    shown = f"params['{name}']"
    require_array(shown, weight, 2, LAYOUTS[name])
    if weight.ndim != 2:
        raise ValueError(
            f"{shown} must have shape {LAYOUTS[name]}, got {describe(weight)}."
        )
    if not all(isinstance(size, int) for size in weight.shape):
        raise ValueError(
            f"{shown} must have sizes that are known, got {describe(weight)}. Only the "
            "axes of labels may be symbolic."
        )
    require_array("hidden", hidden, 1, "(..., features)")
    for of, x in (("hidden", hidden), (shown, weight)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            label_dtype = getattr(labels, "dtype", int)
            swapped = x is hidden and jnp.issubdtype(label_dtype, jnp.floating)
            hint = " Are hidden and labels swapped?" if swapped else ""
            raise TypeError(f"{of} must be of floats, got {describe(x)}.{hint}")
    check_features(name, weight, hidden)
    _, words = _sizes(name, weight)
    if bias is not None:
        require_array("params['bias']", bias, 1, "(words,)")
        if bias.shape != (words,):
            raise ValueError(
                f"params['bias'] must have shape (words,) = {(words,)} to go with "
                f"{shown} {describe(weight)}, got {describe(bias)}."
            )
    dtype = dtype or jnp.result_type(hidden, weight)
    head = {name: jnp.asarray(weight).astype(dtype)}
    if bias is not None:
        # It gets the dtype of the logits that it is added to.
        head["bias"] = jnp.asarray(bias).astype(at_least_float32(dtype))
    return head, jnp.asarray(hidden).astype(dtype)


def _arrays_of(params: Any) -> tuple[dict[str, Any], Any]:
    """`(arrays by name, dtype)`; the dtype is that of a module, or None."""
    dtype = None
    if not isinstance(params, Mapping):
        params, dtype = _params_of_module(params)
    names = {*map(str, params)}
    if len(names & LAYOUTS.keys()) != 1 or names - LAYOUTS.keys() - {"bias"}:
        raise ValueError(f"{_WANTED}{sorted(names)}.{_hint(params, names)}")
    arrays = {name: _unboxed(params[name]) for name in sorted(names, reverse=True)}
    if arrays.get("bias", 0) is None:
        del arrays["bias"]
    return arrays, dtype


def _params_of_module(module: Any) -> tuple[dict[str, Any], Any]:
    """`(params, dtype)` of an NNX `Linear` or `Embed`."""
    adapter = adapter_of(module)
    if adapter == "tdjax.linen":
        raise TypeError(
            "params must be a dict of arrays or an NNX module, got a Linen module, "
            f"{type(module).__name__}. Pass variables['params'], or the part of it "
            "that is the head's, such as variables['params']['head']."
        )
    if adapter != "tdjax.nnx":
        raise TypeError(
            "params must be a dict with 'kernel' or 'embedding' and, if there is one, "
            f"'bias'; got {describe(module)}."
        )
    from flax import nnx
    from flax.nnx.nn import dtypes

    kind = type(module)
    if isinstance(module, nnx.Linear) and kind.__call__ is nnx.Linear.__call__:
        names = ("kernel", "bias")
    elif isinstance(module, nnx.Embed) and kind.attend is nnx.Embed.attend:
        names = ("embedding",)
    else:
        hint = (
            "Call it instead: head(hidden, labels)."
            if kind.__module__.startswith("tdjax.")
            else "Pass {'kernel': ..., 'bias': ...} with what its logits are made of."
        )
        raise TypeError(
            "params must be an nnx.Linear, an nnx.Embed, their state, or a dict of "
            f"arrays; got a {kind.__name__}, whose logits may be others. {hint}"
        )
    usual = {
        "dot_general": jax.lax.dot_general,
        "preferred_element_type": None,
        "promote_dtype": dtypes.promote_dtype,
    }
    own = [n for n, x in usual.items() if getattr(module, n, x) is not x]
    if own:
        raise TypeError(
            f"params must be an nnx.{kind.__name__} without {' and '.join(own)} of its "
            "own, since the loss has its own products. Pass its state to ignore them."
        )
    return {name: getattr(module, name) for name in names}, module.dtype


def _unboxed(x: Any) -> Any:
    """The array in an NNX variable, or in one of Linen's boxes."""
    if hasattr(x, "get_value"):
        x = x.get_value()
    return x.unbox() if hasattr(x, "unbox") else x


def _hint(params: Mapping[str, Any], names: set[str]) -> str:
    """What to write instead of these names."""
    if LAYOUTS.keys() <= names:
        return " Give one of them, not both."
    if "weight" in names:
        return " PyTorch's weight, of shape (words, features), is the 'embedding' here."
    if LAYOUTS.keys() & names:
        return ""
    keys = [jax.tree_util.DictKey(name) for name in LAYOUTS]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    parts = [jax.tree_util.keystr(path[:-1]) for path in paths if path[-1] in keys]
    parts = ", ".join(f"params{part}" for part in parts[:5])
    return f" Pass the head's own part, of {parts}." if parts else ""


def words_of(params: dict[str, Any]) -> int:
    """The size of the vocabulary."""
    name = weight_name(params)
    return _sizes(name, params[name])[1]


def _sizes(name: str, weight: Any) -> tuple[int, int]:
    """`(features, words)`."""
    return weight.shape if name == "kernel" else weight.shape[::-1]


def check_features(name: str, weight: Any, hidden: Any) -> None:
    features, words = _sizes(name, weight)
    if hidden.shape[-1] == features and words:
        return
    is_transposed = hidden.shape[-1] == words != features
    other = "embedding" if name == "kernel" else "kernel"
    hint = (
        f" If the {name} is transposed, name it '{other}'; if hidden are the logits "
        "already, pass what the head gets."
        if is_transposed
        else ""
    )
    raise ValueError(
        f"hidden must have the features of params['{name}'] {LAYOUTS[name]}, and the "
        f"vocabulary must not be empty: got hidden {describe(hidden)}, {name} "
        f"{describe(weight)}.{hint}"
    )
