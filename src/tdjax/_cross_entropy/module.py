"""What the Linen and the NNX head share: logits, or with labels the loss."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe, require_sizes
from tdjax._cross_entropy.log_probs import linear_log_probs
from tdjax._cross_entropy.loss import linear_cross_entropy
from tdjax._dense import dense


def require_vocabulary(vocabulary: Any, embed: type, module: type) -> None:
    """Refuses what is neither a number of words nor the framework's `Embed`."""
    if isinstance(vocabulary, module) and not isinstance(vocabulary, embed):
        raise TypeError(
            "vocabulary must be the number of words or an Embed, got a "
            f"{type(vocabulary).__name__}."
        )
    if not isinstance(vocabulary, module):
        require_sizes(vocabulary=vocabulary)
    elif type(vocabulary).attend is not embed.attend:
        raise TypeError(
            f"vocabulary must be an Embed with Flax's own attend, got a "
            f"{type(vocabulary).__name__}, whose logits may be others. Pass the number "
            "of words, for a kernel of its own."
        )


def logits_or_loss(
    params: Mapping[str, Any], hidden, labels, options: Mapping[str, Any]
) -> Any:
    """The logits of `hidden`, or given labels what `linear_cross_entropy` returns."""
    if labels is not None:
        return linear_cross_entropy(params, hidden, labels, **options)
    cap = options.get("logits_soft_cap")
    given = [name for name in options if name != "logits_soft_cap"]
    if given:
        raise TypeError(
            f"labels must be given with {', '.join(given)}, since without labels the "
            "head returns logits: call head(hidden, labels, ...)."
        )
    kernel = params["kernel"] if "kernel" in params else params["embedding"].T
    bias = {
        name: x.astype(kernel.dtype) for name, x in params.items() if name == "bias"
    }
    logits = dense({**bias, "kernel": kernel}, hidden)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def log_probs_of(
    params: Mapping[str, Any], hidden, labels, options: Mapping[str, Any]
) -> Any:
    """What `linear_log_probs` returns."""
    return linear_log_probs(params, hidden, labels, **options)


def promoted(params: Mapping[str, Any], hidden, dtype: Any) -> tuple[Any, Any]:
    """`(params, hidden)`, kernel and hidden in the dtype of the computation.

    The loss adds the bias to logits of float32, so it stays as it is.
    """
    if dtype is None:
        dtype = jnp.result_type(hidden, *jax.tree.leaves(params))
    cast = lambda x: jnp.asarray(x, dtype)
    params = {name: x if name == "bias" else cast(x) for name, x in params.items()}
    return params, cast(hidden)


def options_of(head: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that are not None, with the head's soft cap."""
    options = {name: x for name, x in options.items() if x is not None}
    if "logits_soft_cap" in options:
        raise TypeError(
            "logits_soft_cap is a field of the head, since it changes the logits too: "
            f"got {describe(options['logits_soft_cap'])} in a call. Give it to "
            f"{type(head).__name__}(...)."
        )
    cap = head.logits_soft_cap
    return options if cap is None else {**options, "logits_soft_cap": cap}
