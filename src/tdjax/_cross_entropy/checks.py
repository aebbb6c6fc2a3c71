"""What `linear_cross_entropy` accepts, and what it says about anything else."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tdjax._checks import (
    adapter_of,
    at_least_float32,
    describe,
    is_concrete,
    require_array,
    require_params,
)
from tdjax._masks import require_mask_dtype

REDUCTIONS = ("mean", "sum", "none")


@contextlib.contextmanager
def forward_mode_refused():
    """Says what to use where JAX only says that `custom_vjp` has no forward mode."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "linear_cross_entropy has no forward-mode derivative (jax.jvp, jax.jacfwd, "
            "jax.linearize). Use jax.grad, jax.vjp or jax.jacrev; for second "
            "derivatives jax.hessian works too."
        ) from error


def require_head(params: Any, hidden: Any, labels: Any) -> tuple[dict[str, Any], Any]:
    """`(params, hidden)` of one dtype, after checking that they match."""
    _refuse_other_params(params)
    _check_kernel_fits(params, hidden)
    kernel, bias = require_params(params, 2, "(features, words)", "(words,)")
    require_array("hidden", hidden, 1, "(..., features)")
    for name, x in (("hidden", hidden), ("params['kernel']", kernel)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            label_dtype = getattr(labels, "dtype", int)
            swapped = x is hidden and jnp.issubdtype(label_dtype, jnp.floating)
            hint = " Are hidden and labels swapped?" if swapped else ""
            raise TypeError(f"{name} must be of floats, got {describe(x)}.{hint}")
    # The bias gets the dtype of the logits that it is added to.
    dtype = jnp.result_type(hidden, kernel)
    params = {"kernel": jnp.asarray(kernel).astype(dtype)}
    if bias is not None:
        params["bias"] = jnp.asarray(bias).astype(at_least_float32(dtype))
    return params, jnp.asarray(hidden).astype(dtype)


def _refuse_other_params(params: Any) -> None:
    """Says how to get the head's params out of what people pass instead."""
    remedies = {
        "tdjax.linen": "variables['params'], or the part of it that is the head's, "
        "such as variables['params']['head']",
        "tdjax.nnx": "{'kernel': head.kernel[...], 'bias': head.bias[...]}",
    }
    adapter = None if isinstance(params, Mapping) else adapter_of(params)
    if adapter in remedies:
        raise TypeError(
            "params must be a dict of arrays, got a Flax module, "
            f"{type(params).__name__}. Pass {remedies[adapter]}."
        )
    if not isinstance(params, Mapping) or "kernel" in params:
        return
    required = "params must have the key 'kernel' and may have 'bias'; got "
    if "embedding" in params:
        raise ValueError(
            f"{required}{sorted(params)}. To use an embedding as the head, pass "
            "{'kernel': params['embedding'].T}."
        )
    if "params" in params:
        raise ValueError(
            f"{required}{sorted(params)}. Pass the head's own part: {_path_to(params)}."
        )


def _path_to(params: Mapping[str, Any]) -> str:
    """An example of where the head's dict is, like `params['params']['Dense_0']`."""
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if path[-1] == jax.tree_util.DictKey("kernel"):
            return f"params{jax.tree_util.keystr(path[:-1])}"
    return "params['params']"


def _check_kernel_fits(params: Any, hidden: Any) -> None:
    kernel: Any = params.get("kernel") if isinstance(params, Mapping) else None
    if len(getattr(kernel, "shape", ())) != 2 or not getattr(hidden, "shape", ()):
        return  # `require_params` and `require_array` say what is wrong.
    features = hidden.shape[-1]
    are_labels = not jnp.issubdtype(getattr(hidden, "dtype", int), jnp.floating)
    if are_labels or (features == kernel.shape[0] and kernel.shape[1]):
        return
    is_transposed = features == kernel.shape[1] != kernel.shape[0]
    hint = " The kernel looks transposed: pass kernel.T." if is_transposed else ""
    raise ValueError(
        "hidden must have the features of params['kernel'] (features, words), and the "
        f"vocabulary must not be empty: got hidden {describe(hidden)}, kernel "
        f"{describe(kernel)}.{hint}"
    )


def check_steps(hidden: Any, labels: Any, mask: Any, words: int) -> None:
    require_array("labels", labels, 0, "(...)")
    one_hot = labels.shape == (*hidden.shape[:-1], words)
    hint = " For one-hot labels pass labels.argmax(-1)." if one_hot else ""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {describe(labels)}.{hint}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "labels must have the shape of hidden without its features, got "
            f"{describe(labels)} for hidden {describe(hidden)}.{hint}"
        )
    if mask is not None:
        require_mask_dtype(mask)
        if mask.shape != labels.shape:
            transposed = mask.ndim == 2 and mask.shape[::-1] == labels.shape
            hint = " The mask looks transposed: pass mask.T." if transposed else ""
            raise ValueError(
                "mask must have the shape of labels, got "
                f"{describe(mask)} for labels {describe(labels)}.{hint}"
            )


def check_options(
    reduction, label_smoothing, z_loss, logits_soft_cap, ignore_class
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}.")
    _require_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")
    _require_number("z_loss", z_loss)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be 0 or positive, got {z_loss}.")
    if (cap := logits_soft_cap) is not None:
        _require_number("logits_soft_cap", cap)
        if not 0 < cap < math.inf:
            raise ValueError(f"logits_soft_cap must be positive, got {cap}.")
    if ignore_class is not None:
        _require_number("ignore_class", ignore_class, int | np.integer, "an int")


def check_axis_name(axis_name: Any, reduction: str) -> None:
    """Refuses what names no axes, and `axis_name` where it would do nothing."""
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            "axis_name must be the name of a mesh axis, or a tuple of names, got "
            f"{describe(axis_name)}."
        )
    if reduction == "none":
        raise ValueError(
            f"axis_name={axis_name!r} sums over devices, so it needs reduction='mean' "
            "or 'sum', got 'none'. Leave it out: each loss is that of one step."
        )


def _require_number(
    name: str,
    value: Any,
    kinds: Any = int | float | np.integer | np.floating,
    wanted: str = "a Python number",
) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")


def check_labels(labels, mask, ignore_class: int | None, words: int) -> None:
    """Refuses labels outside the vocabulary, where values can be read."""
    if not (is_concrete(labels) and (mask is None or is_concrete(mask))):
        return
    labels = np.asarray(labels)
    wrong = (labels < 0) | (labels >= words)
    if mask is not None:
        wrong &= np.asarray(mask)
    if ignore_class is not None:
        wrong &= labels != ignore_class
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"labels must be from 0 to {words - 1}, params['kernel']'s words, at "
            f"unmasked steps; got {labels[place]} at {place} ({int(wrong.sum())} of "
            f"{wrong.size} are out of range). Mask them, or give ignore_class."
        )
