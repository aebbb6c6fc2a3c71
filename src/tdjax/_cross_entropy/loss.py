"""The loss of a softmax head at every step: arguments, their checks, block sizes.

`blocks` computes it.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from tdjax._checks import (
    describe,
    is_concrete,
    require_array,
    require_params,
    require_positive_int,
)
from tdjax._cross_entropy.blocks import Head, losses_per_step, weighted_loss
from tdjax._masks import over_trailing_axes, require_mask_dtype

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    params: Any,
    hidden: Float[Array | np.ndarray, "*steps features"],
    labels: Integer[Array | np.ndarray, "*steps"],
    *,
    mask: Bool[Array | np.ndarray, "*steps"] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: int | float = 0.0,
    z_loss: int | float = 0.0,
    logits_soft_cap: int | float | None = None,
    ignore_class: int | None = None,
    chunk_size: int | None = None,
    vocab_chunk_size: int | None = None,
) -> Float[Array, "..."]:
    """The cross-entropy of `dense(params, hidden)`, without its `(..., words)` logits.

    Gives what `optax.softmax_cross_entropy_with_integer_labels` gives for the logits of
    a Dense head at every step, averaged over the valid steps. But only a block of
    logits exists at a time, and `"mean"` and `"sum"` make their gradients in the same
    pass. Half precision is summed in float32.

    It works under `jit`, `vmap`, `grad`, `jax.hessian` and `jax.checkpoint`; forward
    mode (`jax.jvp`, `jax.jacfwd`) is not supported. `jax.shard_map` needs
    `check_vma=False`. Call it under `jit`: its loops are compiled at each call
    otherwise. See docs/guide.md#loss.

    Args:
      params: `{"kernel": (features, words), "bias": (words,)}`, as of `dense` and of
        Flax's `Dense`; the bias may be absent. The kernel of a tied embedding, `(words,
        features)`, is its transpose.
      hidden: `(..., features)`, the inputs of the head, such as `(batch, time,
        features)`.
      labels: `(...)`, integers from 0 to `words - 1`; anything at masked and ignored
        steps. Inside `jit`, where values can't be checked, any other label makes the
        loss and its gradient NaN.
      mask: `(...)`, bool, True at the valid steps; by default all. Masked steps have
        the loss 0 and contribute no gradient, even where `hidden` is NaN.
      reduction: `"mean"` over the valid steps, 0 if there are none; `"sum"`; or
        `"none"` for the loss of each step, whose gradient makes the logits again.
      label_smoothing: from 0 to 1, the share of the label's weight that is spread over
        all words, as in `optax.smooth_labels`.
      z_loss: the weight of the squared log of the softmax's denominator, which is added
        to each loss (Chowdhery et al. 2022).
      logits_soft_cap: bounds the logits smoothly: `cap * tanh(logits / cap)` (Bello et
        al. 2016).
      ignore_class: a label that marks steps to leave out, as the mask does.
      chunk_size: steps per block of logits. The default follows the shapes: a block has
        at most a ninth of all logits, or little memory (32 MB on a CPU, 256 MB
        elsewhere).
      vocab_chunk_size: words per block. By default all, unless the vocabulary is so
        large for the number of steps that a block would have fewer than 256 of them.
        With words in chunks the gradient makes the logits twice.

    Returns:
      The mean or sum, `()`, or the losses, `(...)`: float32, or float64 if the inputs
      are.

    Raises:
      TypeError: if an argument is of the wrong kind, or under forward mode.
      ValueError: if shapes do not fit each other, an option is out of range, or an
        unmasked label is outside the vocabulary.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> head = tdjax.init_dense(jax.random.key(0), 8, 1000)
      >>> hidden, labels = jnp.ones((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> mask = tdjax.lengths_to_mask(jnp.array([5, 2]), 5)
      >>> loss = lambda p: tdjax.linear_cross_entropy(p, hidden, labels, mask=mask)
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(head))
      {'bias': (1000,), 'kernel': (8, 1000)}

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024,
      https://arxiv.org/abs/2411.09009.

      Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024,
      https://arxiv.org/abs/2410.10989.

      Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022,
      https://arxiv.org/abs/2204.02311 (z-loss).

      Bello et al., Neural Combinatorial Optimization with Reinforcement Learning, 2016,
      https://arxiv.org/abs/1611.09940 (soft cap).
    """
    params, hidden = _require_head(params, hidden)
    features, words = params["kernel"].shape
    _check_steps(hidden, labels, mask, words)
    _check_options(reduction, label_smoothing, z_loss, logits_soft_cap, ignore_class)
    _check_sizes(chunk_size=chunk_size, vocab_chunk_size=vocab_chunk_size)
    # The number of words need not fit the dtype of the labels.
    labels = jnp.asarray(labels)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    valid = _valid_steps(labels, mask, ignore_class)
    _check_labels(labels, valid, words)

    hidden, labels = _guard(hidden, labels, valid, words)
    steps, valid = labels.size, jnp.ravel(valid)
    rows = params, jnp.reshape(hidden, (steps, features)), jnp.ravel(labels)
    sizes = _block_sizes(steps, features, words, chunk_size, vocab_chunk_size)
    is_half = jnp.finfo(hidden.dtype).bits < 32
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    head = Head(float(label_smoothing), float(z_loss), cap, *sizes, is_half)
    try:
        if reduction == "none":
            losses = jnp.where(valid, losses_per_step(head, *rows), 0)
            return jnp.reshape(losses, labels.shape)
        weights = valid.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        if reduction == "mean":
            weights /= jnp.maximum(jnp.sum(weights), 1)
        return weighted_loss(head, *rows, weights)
    except TypeError as error:
        _explain_forward_mode(error)
        raise


def _guard(hidden, labels, valid, words: int) -> tuple[Any, Any]:
    """Zeros at masked steps, and NaN where a label is outside the vocabulary.

    So neither a NaN nor its gradient passes from a masked step, and an impossible
    label makes both the loss and its gradient NaN.
    """
    over_features = lambda steps: over_trailing_axes(steps, hidden.ndim)
    known = (labels >= 0) & (labels < words)
    hidden = jnp.where(over_features(known), hidden, jnp.nan)
    hidden = jnp.where(over_features(valid), hidden, 0)
    return hidden, jnp.where(valid, labels, 0)


def _explain_forward_mode(error: TypeError) -> None:
    if "custom_vjp" in str(error):
        error.add_note(
            "linear_cross_entropy has no forward mode (jax.jvp, jax.jacfwd, "
            "jax.linearize). Use reverse mode (jax.grad, jax.vjp, jax.hessian), or "
            "make the logits with tdjax.dense."
        )


def _require_head(params: Any, hidden: Any) -> tuple[dict[str, Any], Any]:
    """`(params, hidden)` in one dtype, after checking that they fit each other."""
    _explain_params(params)
    kernel, bias = require_params(params, 2, "(features, words)", "(words,)")
    require_array("hidden", hidden, 1, "(..., features)")
    for name, x in (("hidden", hidden), ("params['kernel']", kernel)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of floats, got {describe(x)}.")
    if hidden.shape[-1] != kernel.shape[0] or not kernel.shape[1]:
        is_transposed = hidden.shape[-1] == kernel.shape[1]
        raise ValueError(
            "hidden must have the features of params['kernel'] (features, words), and "
            f"the vocabulary must not be empty: got hidden {describe(hidden)}, kernel "
            f"{describe(kernel)}."
            + " Transpose the kernel: params['kernel'].T."
            * is_transposed
        )
    # One dtype for the product; the bias in that of the sums it is added to.
    dtype = jnp.result_type(hidden, kernel)
    params = {"kernel": jnp.asarray(kernel).astype(dtype)}
    if bias is not None:
        wide = jnp.promote_types(dtype, jnp.float32)
        params["bias"] = jnp.asarray(bias).astype(wide)
    return params, jnp.asarray(hidden).astype(dtype)


def _explain_params(params: Any) -> None:
    """Refuses parameters of other layouts that people have at hand."""
    if not isinstance(params, Mapping):
        return
    if "embedding" in params:
        raise ValueError(
            "params must have the key 'kernel' (features, words), got 'embedding' "
            f"{describe(params['embedding'])}. Give {{'kernel': embedding.T}}."
        )
    inner = params.get("params", {})
    if isinstance(inner, Mapping) and inner:
        where = "" if "kernel" in inner else f"[{next(iter(inner))!r}]"
        raise ValueError(
            "params must be the dict of the head with 'kernel' and 'bias', got the "
            f"variables of a module. Give variables['params']{where}."
        )


def _check_steps(hidden: Any, labels: Any, mask: Any, words: int) -> None:
    require_array("labels", labels, 0, "(...)")
    if labels.shape == (*hidden.shape[:-1], words) and labels.ndim == hidden.ndim:
        raise ValueError(
            "labels must have the shape of hidden without its features, got one-hot "
            f"labels or probabilities {describe(labels)}. Give labels.argmax(-1)."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {describe(labels)}.")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "labels must have the shape of hidden without its features, got "
            f"{describe(labels)} for hidden {describe(hidden)}."
        )
    if mask is not None:
        require_mask_dtype(mask)
        if mask.shape != labels.shape:
            raise ValueError(
                "mask must have the shape of labels, got "
                f"{describe(mask)} for labels {describe(labels)}."
            )


def _check_options(
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
    if logits_soft_cap is not None:
        _require_number("logits_soft_cap", logits_soft_cap)
        if not 0 < logits_soft_cap < math.inf:
            raise ValueError(
                f"logits_soft_cap must be positive, got {logits_soft_cap}."
            )
    if ignore_class is not None:
        is_int = isinstance(ignore_class, int | np.integer)
        if not is_int or isinstance(ignore_class, bool):
            raise TypeError(
                f"ignore_class must be an int, got {describe(ignore_class)}."
            )


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if size is not None:
            require_positive_int(name, size)


def _require_number(name: str, value: Any) -> None:
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be a Python number, got {describe(value)}.")


def _valid_steps(labels, mask, ignore_class):
    valid = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask)
    return valid if ignore_class is None else valid & (labels != ignore_class)


def _check_labels(labels, valid, words: int) -> None:
    if not (is_concrete(labels) and is_concrete(valid)):
        return
    labels = np.asarray(labels)
    wrong = np.asarray(valid) & ((labels < 0) | (labels >= words))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"labels must be from 0 to {words - 1} at unmasked steps, for the words of "
            f"params['kernel']; got {labels[place]} at {place} ({int(wrong.sum())} of "
            f"{wrong.size} are out of range). Mask them, or give ignore_class."
        )


def _block_sizes(
    steps: Any,
    features: int,
    words: int,
    chunk_size: int | None,
    vocab_chunk_size: int | None,
) -> tuple[int, int, int, int]:
    """Steps and words in a block of logits, with gradients and without.

    Small blocks cost passes over the kernel's gradient, large ones memory. So a block
    has at most a ninth of all logits, or little memory. Where that leaves too few
    steps, the words go in chunks and the logits are made twice.
    """
    on_cpu = jax.default_backend() == "cpu"
    little, in_cache = (2**23, 2**20) if on_cpu else (2**26, 2**26)
    if chunk_size is None and not isinstance(steps, int):
        chunk_size = 512
    elif chunk_size is None:
        bound = max(little // words, steps // 9)
        chunk_size = min(max(512, features), bound)
        if vocab_chunk_size is not None or bound < min(256, steps):
            chunk_size = 1024
            vocab_chunk_size = vocab_chunk_size or max(in_cache // 1024, 128)
    forward_rows = _even(steps, 1024)
    forward_words = max(in_cache // forward_rows, 128)
    if vocab_chunk_size is not None:
        forward_words = min(forward_words, vocab_chunk_size)
    sizes = (_even(steps, chunk_size), vocab_chunk_size or words)
    return *sizes, forward_rows, forward_words


def _even(steps: Any, size: int) -> int:
    """The size of equal chunks of at most `size` steps."""
    # A symbolic number of steps can't be compared.
    if not isinstance(steps, int):
        return size
    chunks = max(-(-steps // size), 1)
    return max(-(-steps // chunks), 1)
