"""Losses of sequences: the softmax head at every step and its cross-entropy in one."""

import math
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

    The same as `optax.softmax_cross_entropy_with_integer_labels(logits, labels)` of the
    logits of a Dense head at every step, and a mean over the steps that count. But the
    logits are made a block at a time, and with `reduction="mean"` and `"sum"` their
    gradients are made in the same pass. So the memory is that of a block, and of the
    gradients themselves.

    It works under `jit`, `vmap`, `grad` and `jax.checkpoint`. Second derivatives are
    right (`jax.hessian`, `grad` of `grad`); forward mode alone (`jax.jvp`) is refused.
    `jax.shard_map` needs `check_vma=False`. Call it under `jit`: its loops are compiled
    at each call otherwise. Products of half-precision inputs are summed in float32, and
    so are losses.

    Args:
      params: `{"kernel": (features, words), "bias": (words,)}`, as of `dense` and of
        Flax's `Dense`; the bias may be missing. For a tied embedding, `(words,
        features)`, the kernel is its transpose.
      hidden: `(..., features)`, the inputs of the head: `(batch, time, features)`, say.
      labels: `(...)`, integers from 0 to `words - 1`, but for masked and ignored steps,
        where they may be anything. Inside `jit`, where values can't be looked at, any
        other label makes the loss and its gradient NaN.
      mask: `(...)`, bool: the steps that count, all by default. Others have the loss 0,
        and neither get nor give a gradient, were `hidden` NaN there.
      reduction: `"mean"` over the steps that count, 0 if there are none; `"sum"`; or
        `"none"` for the loss of each step. The gradient of `"none"` makes the logits
        once more.
      label_smoothing: from 0 to 1: the share of the label's weight that is spread over
        all words, as by `optax.smooth_labels`.
      z_loss: the weight of the squared log of the softmax's denominator, which is added
        to each loss (Chowdhery et al. 2022).
      logits_soft_cap: bounds the logits smoothly: `cap * tanh(logits / cap)` (Bello et
        al. 2016).
      ignore_class: a label that marks steps to leave out, as does the mask.
      chunk_size: steps in a block of logits. By default chosen by shape, so that a
        block has at most a ninth of all logits, or little memory (32 MB on a CPU, 256
        MB elsewhere).
      vocab_chunk_size: words in a block. By default all, unless the vocabulary is so
        large for the number of steps that a chunk would have less than 256 of them.
        With words in chunks the gradient makes the logits twice. The loss alone has
        smaller blocks of its own.

    Returns:
      The mean or sum, `()`, or the losses, `(...)`: float32, or float64 if the inputs
      are.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if shapes do not fit each other, an option is out of its range, or a
        label that counts is no word.

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
    _check_steps(hidden, labels, mask)
    # Numbers of words need not fit the dtype that the labels came in.
    labels = jnp.asarray(labels)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    _check_options(reduction, label_smoothing, z_loss, logits_soft_cap, ignore_class)
    for name, size in (
        ("chunk_size", chunk_size),
        ("vocab_chunk_size", vocab_chunk_size),
    ):
        if size is not None:
            require_positive_int(name, size)
    features, words = params["kernel"].shape
    valid = _valid_steps(labels, mask, ignore_class)
    _check_labels(labels, valid, words)
    # Where a loss is hidden, neither NaN nor its gradient passes. A label that is no
    # word makes both NaN.
    over_features = lambda steps: over_trailing_axes(steps, hidden.ndim)
    known = (labels >= 0) & (labels < words)
    hidden = jnp.where(over_features(known), hidden, jnp.nan)
    hidden = jnp.where(over_features(valid), hidden, 0)
    labels, valid = (jnp.ravel(jnp.where(valid, labels, 0)), jnp.ravel(valid))
    steps = labels.shape[0]
    sizes = _block_sizes(steps, features, words, chunk_size, vocab_chunk_size)
    is_half = jnp.finfo(hidden.dtype).bits < 32
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    head = Head(float(label_smoothing), float(z_loss), cap, *sizes, is_half)
    rows = params, jnp.reshape(hidden, (steps, features)), labels
    if reduction == "none":
        losses = jnp.where(valid, losses_per_step(head, *rows), 0)
        return jnp.reshape(losses, hidden.shape[:-1])
    weights = valid.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    if reduction == "mean":
        weights /= jnp.maximum(jnp.sum(weights), 1)
    return weighted_loss(head, *rows, weights)


def _require_head(params: Any, hidden: Any) -> tuple[dict[str, Any], Any]:
    """`(params, hidden)`, once it is sure that they fit each other."""
    kernel, bias = require_params(params, 2, "(features, words)", "(words,)")
    require_array("hidden", hidden, 1, "(..., features)")
    for name, x in (("hidden", hidden), ("params['kernel']", kernel)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of floats, got {describe(x)}.")
    if hidden.shape[-1] != kernel.shape[0] or not kernel.shape[1]:
        raise ValueError(
            "hidden must have the features of params['kernel'] (features, words), and "
            f"there must be a word: got hidden {describe(hidden)}, kernel "
            f"{describe(kernel)}."
        )
    # Of one dtype, as their product has it; the bias as the sums that it is added to.
    dtype = jnp.result_type(hidden, kernel)
    params = {"kernel": jnp.asarray(kernel).astype(dtype)}
    if bias is not None:
        wide = jnp.promote_types(dtype, jnp.float32)
        params["bias"] = jnp.asarray(bias).astype(wide)
    return params, jnp.asarray(hidden).astype(dtype)


def _check_steps(hidden: Any, labels: Any, mask: Any) -> None:
    require_array("labels", labels, 0, "(...)")
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
            f"labels must be from 0 to {words - 1}, params['kernel']'s words, at "
            f"steps that count; got {labels[place]} at {place} ({int(wrong.sum())} of "
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

    Few steps in a block cost passes over the kernel's gradient, many cost memory: at
    most a ninth of all logits, if that is not little anyway. Where that leaves too few
    steps, the words go in chunks, and the logits are made twice.
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
    """At most `size`, with the least to fill up in the last chunk."""
    # A symbolic number of steps can't be compared.
    if not isinstance(steps, int):
        return size
    chunks = max(-(-steps // size), 1)
    return max(-(-steps // chunks), 1)
