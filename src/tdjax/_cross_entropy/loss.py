"""`linear_cross_entropy`: its arguments and checks. The computation is in `blocks`."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from tdjax._checks import (
    adapter_of,
    at_least_float32,
    clipped_int32,
    describe,
    is_concrete,
    require_array,
    require_params,
    require_sizes,
)
from tdjax._cross_entropy.blocks import Head, losses_of_steps, weighted_loss
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
    """The cross-entropy of `dense(params, hidden)`, without storing the logits.

    Equals `optax.softmax_cross_entropy_with_integer_labels` of a Dense head's logits,
    averaged over the valid steps. But only one block of logits exists at a time, and
    `"mean"` and `"sum"` compute their gradients in the same pass. Call it under `jit`:
    otherwise its loops are compiled at every call. See docs/loss.md for memory,
    precision and transformations.

    Args:
      params: `{"kernel": (features, words), "bias": (words,)}`, as in `dense` and
        Flax's `Dense`; the bias is optional. For a tied embedding of shape `(words,
        features)` pass `{"kernel": embedding.T}`.
      hidden: `(..., features)`, the inputs of the head, such as `(batch, time,
        features)`.
      labels: `(...)`, integers from 0 to `words - 1`; anything at masked and ignored
        steps. Inside `jit`, where values can't be checked, a label outside this range
        makes the loss and its gradient NaN.
      mask: `(...)`, bool, True at the valid steps; all by default. Masked steps have
        loss 0 and contribute no gradient, even where `hidden` is NaN.
      reduction: `"mean"` over the valid steps (0 if there are none), `"sum"`, or
        `"none"` for the loss of each step, whose gradient computes the logits again.
      label_smoothing: from 0 to 1, the share of each label's probability that is
        spread over all words, as in `optax.smooth_labels`.
      z_loss: weight of the squared log of the softmax's denominator, added to each
        loss (Chowdhery et al. 2022).
      logits_soft_cap: replaces the logits by `cap * tanh(logits / cap)` (Bello et al.
        2016).
      ignore_class: steps with this label are masked too.
      chunk_size: steps per block. By default a block holds at most a ninth of all
        logits, or 32 MB on a CPU and 256 MB elsewhere if that is more.
      vocab_chunk_size: words per block; all by default, except for vocabularies so
        large that a block would have fewer than 256 steps. Chunks of words make the
        gradient compute the logits twice.

    Returns:
      The mean or sum, `()`, or the losses, `(...)`; float32, or float64 if the inputs
      are.

    Raises:
      TypeError: if an argument is of the wrong kind, or in forward mode (`jax.jvp`);
        under `jit` with JAX's own message about `custom_vjp`.
      ValueError: if shapes do not match, an option is out of range, or an unmasked
        label is outside the vocabulary.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> head = tdjax.init_dense(jax.random.key(0), 8, 1000)
      >>> hidden, labels = jnp.ones((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> loss = lambda head: tdjax.linear_cross_entropy(head, hidden, labels)
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(head))
      {'bias': (1000,), 'kernel': (8, 1000)}

    References:
      Wijmans et al., Cut Your Losses, 2024, https://arxiv.org/abs/2411.09009.
      Hsu et al., Liger Kernel, 2024, https://arxiv.org/abs/2410.10989.
      Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311 (z-loss).
      Bello et al., 2016, https://arxiv.org/abs/1611.09940 (soft cap).
    """
    params, hidden = _require_head(params, hidden, labels)
    features, words = params["kernel"].shape
    _check_steps(hidden, labels, mask, words)
    _check_options(reduction, label_smoothing, z_loss, logits_soft_cap, ignore_class)
    chunks = {"chunk_size": chunk_size, "vocab_chunk_size": vocab_chunk_size}
    chunk_size, vocab_chunk_size = require_sizes(**chunks, optional=True)
    valid = _valid_steps(labels, mask, ignore_class)
    _check_labels(labels, valid, words)
    # What is out of range stays so.
    labels = clipped_int32(labels, -1, words)
    rows, row_is_valid = _flatten_steps(hidden, labels, valid, words)
    sizes = _block_sizes(valid.size, features, words, chunk_size, vocab_chunk_size)
    is_half = jnp.finfo(hidden.dtype).bits < 32
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    head = Head(float(label_smoothing), float(z_loss), cap, *sizes, is_half)
    with _forward_mode_refused():
        if reduction == "none":
            losses: Any = losses_of_steps(head, params, *rows)
            return jnp.reshape(jnp.where(row_is_valid, losses, 0), valid.shape)
        weights = row_is_valid.astype(at_least_float32(hidden.dtype))
        if reduction == "mean":
            weights /= jnp.maximum(jnp.sum(weights), 1)
        return weighted_loss(head, params, *rows, weights)


@contextlib.contextmanager
def _forward_mode_refused():
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


def _require_head(params: Any, hidden: Any, labels: Any) -> tuple[dict[str, Any], Any]:
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


def _check_steps(hidden: Any, labels: Any, mask: Any, words: int) -> None:
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
    if (cap := logits_soft_cap) is not None:
        _require_number("logits_soft_cap", cap)
        if not 0 < cap < math.inf:
            raise ValueError(f"logits_soft_cap must be positive, got {cap}.")
    if ignore_class is not None:
        _require_number("ignore_class", ignore_class, int | np.integer, "an int")


def _require_number(
    name: str,
    value: Any,
    kinds: Any = int | float | np.integer | np.floating,
    wanted: str = "a Python number",
) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}.")


def _valid_steps(labels, mask, ignore_class):
    valid = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask)
    if ignore_class is None:
        return valid
    info = jnp.iinfo(labels.dtype)
    # Labels can't have a value that their dtype can't hold.
    return (
        valid & (labels != ignore_class)
        if info.min <= ignore_class <= info.max
        else valid
    )


def _flatten_steps(hidden, labels, valid, words: int) -> tuple[Any, Any]:
    """`((hidden, labels), valid)` with all steps on one axis.

    Neither NaN nor a gradient passes where a step is masked. A label outside the
    vocabulary makes both NaN.
    """
    over_features = lambda steps: over_trailing_axes(steps, hidden.ndim)
    unknown = valid & ((labels < 0) | (labels >= words))
    hidden = jnp.where(over_features(valid), hidden, 0)
    # In this order, since `jax_debug_nans` stops at any NaN.
    hidden = jnp.where(over_features(unknown), jnp.nan, hidden)
    labels, valid = jnp.ravel(jnp.where(valid, labels, 0)), jnp.ravel(valid)
    return (jnp.reshape(hidden, (labels.shape[0], hidden.shape[-1])), labels), valid


def _check_labels(labels, valid, words: int) -> None:
    if not (is_concrete(labels) and is_concrete(valid)):
        return
    labels = np.asarray(labels)
    wrong = np.asarray(valid) & ((labels < 0) | (labels >= words))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"labels must be from 0 to {words - 1}, params['kernel']'s words, at "
            f"unmasked steps; got {labels[place]} at {place} ({int(wrong.sum())} of "
            f"{wrong.size} are out of range). Mask them, or give ignore_class."
        )


def _block_sizes(
    steps: Any,
    features: int,
    words: int,
    chunk_size: int | None,
    vocab_chunk_size: int | None,
) -> tuple[int, int, int, int]:
    """Steps and words per block of logits: with gradients, then without.

    Small blocks cost more passes over the kernel's gradient, large ones cost memory: a
    block may have a ninth of all logits, or `little`. Where that allows too few steps,
    the words go in chunks too, and the logits are computed twice.
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
    """At most `size`, such that the last chunk needs the least padding."""
    # A symbolic number of steps of `jax.export` can't be compared.
    if not isinstance(steps, int):
        return size
    chunks = max(-(-steps // size), 1)
    return max(-(-steps // chunks), 1)
