"""What the Linen and the NNX head share: logits, or with labels the loss."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe, require_sizes
from tdjax._cross_entropy.checks import require_soft_cap
from tdjax._cross_entropy.head import check_features
from tdjax._cross_entropy.log_probs import linear_log_probs
from tdjax._cross_entropy.loss import linear_cross_entropy
from tdjax._cross_entropy.products import weight_name
from tdjax._dense import dense


def check_fields(
    vocabulary: Any, cap: Any, embed: type, module: type, promote_dtype: Any
) -> None:
    """Refuses fields of a head; `promote_dtype` is that of an `Embed` by default."""
    require_soft_cap(cap)
    if not isinstance(vocabulary, module):
        require_sizes(vocabulary=vocabulary)
        return
    if not isinstance(vocabulary, embed):
        raise TypeError(
            "vocabulary must be the number of words or an Embed, got a "
            f"{type(vocabulary).__name__}."
        )
    promotes = getattr(vocabulary, "promote_dtype", promote_dtype)
    if type(vocabulary).attend is not embed.attend or promotes is not promote_dtype:
        raise TypeError(
            "vocabulary must be an Embed with Flax's own attend and promote_dtype, got "
            f"a {type(vocabulary).__name__}, whose logits may be others. Pass the "
            "number of words, for a kernel of its own."
        )


def logits_or_loss(
    head: Any, params: Mapping[str, Any], hidden, labels, options: Mapping[str, Any]
) -> Any:
    """The logits of `hidden`, or given labels what `linear_cross_entropy` returns."""
    options = _options_of(head, options, linear_cross_entropy)
    if labels is not None:
        return linear_cross_entropy(params, hidden, labels, **options)
    cap = options.pop("logits_soft_cap", None)
    if options:
        raise TypeError(
            f"labels must be given with {', '.join(options)}, since without labels the "
            "head returns logits: call head(hidden, labels, ...)."
        )
    kernel = params["kernel"] if "kernel" in params else params["embedding"].T
    of_dense = {"kernel": kernel}
    if "bias" in params:
        of_dense["bias"] = params["bias"].astype(kernel.dtype)
    logits = dense(of_dense, hidden)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def log_probs_of(
    head: Any, params: Mapping[str, Any], hidden, labels, options: Mapping[str, Any]
) -> Any:
    """What `linear_log_probs` returns."""
    options = _options_of(head, options, linear_log_probs)
    return linear_log_probs(params, hidden, labels, **options)


def promoted(params: dict[str, Any], hidden, dtype: Any) -> tuple[Any, Any]:
    """`(params, hidden)`, kernel and hidden in the dtype of the computation.

    The loss adds the bias to logits of float32, so it stays as it is.
    """
    name = weight_name(params)
    check_features(name, params[name], hidden)
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"hidden must be of floats, got {describe(hidden)}.")
    if dtype is None:
        dtype = jnp.result_type(hidden, *jax.tree.leaves(params))
    return {**params, name: params[name].astype(dtype)}, jnp.asarray(hidden, dtype)


def _options_of(head: Any, options: Mapping[str, Any], fun: Callable) -> dict[str, Any]:
    """The options of a call that are not None, with the head's soft cap."""
    known = [*inspect.signature(fun).parameters][3:]
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name} is not an option; those of {fun.__name__} are "
                f"{', '.join(known)}."
            )
    given = {name: x for name, x in options.items() if x is not None}
    if "logits_soft_cap" in given:
        raise TypeError(
            "logits_soft_cap is a field of the head, since it changes the logits too: "
            f"got {describe(given['logits_soft_cap'])} in a call. Give it to "
            f"{type(head).__name__}(...)."
        )
    cap = head.logits_soft_cap
    return given if cap is None else {**given, "logits_soft_cap": cap}
