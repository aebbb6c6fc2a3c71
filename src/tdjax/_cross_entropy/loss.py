"""`linear_cross_entropy`: its arguments, and the loss of the steps of one device.

`checks` says what is accepted, `mesh` which part of it a device gets, and `blocks`
computes the losses and gradients.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from tdjax._checks import at_least_float32, clipped_int32, require_sizes
from tdjax._cross_entropy.blocks import Head, losses_of_steps, weighted_loss
from tdjax._cross_entropy.checks import (
    check_axis_name,
    check_labels,
    check_options,
    check_steps,
    forward_mode_refused,
    require_head,
)
from tdjax._cross_entropy.mesh import layout_on_mesh
from tdjax._masks import over_trailing_axes
from tdjax._mesh import names_in, vary_together

IGNORED = -2  # In place of `ignore_class`; -1 is a label outside the vocabulary.


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
    sharding: PartitionSpec | None = None,
    kernel_sharding: PartitionSpec | None = None,
    axis_name: Any = None,
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
      sharding: `P(batch, time)`, the mesh axes that split the axes of `labels`, on the
        mesh in context (`jax.set_mesh`). Each device computes the losses of its own
        steps. The sizes of blocks are those of one device. By default it is what the
        types say under explicit axes, and the compiler's choice under automatic ones.
      kernel_sharding: `P(features, words)`, the mesh axes that split the kernel; those
        of words split the bias too. With words split, each device has its own words
        and only three or four numbers of each step are sent, and one gradient by
        `hidden`. Axes of features, and those that split steps too, are gathered (FSDP).
        See docs/mesh.md. By default as `sharding`.
      axis_name: inside a `jax.shard_map` of your own, the mesh axes that split the
        steps: `"mean"` and `"sum"` are then those of all devices. With its default
        `check_vma=True`, gradients by shared params are summed over them already.

    Returns:
      The mean or sum, `()`, or the losses, `(...)`; float32, or float64 if the inputs
      are.

    Raises:
      TypeError: if an argument is of the wrong kind, or in forward mode (`jax.jvp`);
        under `jit` with JAX's own message about `custom_vjp`.
      ValueError: if shapes do not match, an option is out of range, an unmasked label
        is outside the vocabulary, or a sharding does not fit the mesh or the sizes.

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
    params, hidden = require_head(params, hidden, labels)
    words = params["kernel"].shape[1]
    check_steps(hidden, labels, mask, words)
    check_options(reduction, label_smoothing, z_loss, logits_soft_cap, ignore_class)
    chunks = {"chunk_size": chunk_size, "vocab_chunk_size": vocab_chunk_size}
    chunk_size, vocab_chunk_size = require_sizes(**chunks, optional=True)
    check_labels(labels, mask, ignore_class, words)
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    options = Options(
        float(label_smoothing), float(z_loss), cap, words,
        reduction, chunk_size, vocab_chunk_size,
    )  # fmt: skip
    labels = _known_labels(labels, ignore_class, words)
    loss = functools.partial(_loss_of_steps, options)
    arrays = params, hidden, labels, mask
    with forward_mode_refused():
        if axis_name is not None:
            check_axis_name(axis_name, reduction)
        layout = layout_on_mesh(sharding, kernel_sharding, *arrays)
        outside = names_in(axis_name)
        if layout is None:
            return loss(*arrays, step_axes=outside)
        return layout.run(loss, reduction, outside, *arrays)


class Options(NamedTuple):
    """The options that are the same on all devices."""

    label_smoothing: float
    z_loss: float
    logits_soft_cap: float | None
    words: int
    reduction: str
    chunk_size: int | None
    vocab_chunk_size: int | None


def _known_labels(labels, ignore_class: int | None, words: int):
    """Labels as int32, those outside the vocabulary as -1 or `words`, or `IGNORED`."""
    known = clipped_int32(labels, -1, words)
    info = jnp.iinfo(labels.dtype)
    # Labels can't have a value that their dtype can't hold.
    if ignore_class is None or not info.min <= ignore_class <= info.max:
        return known
    return jnp.where(labels == ignore_class, IGNORED, known)


def _loss_of_steps(
    options: Options,
    params: Any,
    hidden: Any,
    labels: Any,
    mask: Any,
    step_axes: tuple[str, ...] = (),
    word_axes: tuple[str, ...] = (),
) -> Any:
    """The loss of the steps that one device has, and of the words that it has.

    The devices along the mesh axes `step_axes` have other steps, those along
    `word_axes` other words.
    """
    valid = labels != IGNORED
    if mask is not None:
        valid &= mask
    hidden, labels = _flatten_steps(hidden, labels, valid, options.words)
    weights = jnp.ravel(valid).astype(at_least_float32(hidden.dtype))
    if options.reduction == "mean":
        count = jnp.sum(weights)
        count = jax.lax.psum(count, step_axes) if step_axes else count
        weights /= jnp.maximum(count, 1)
    # Their gradients are summed over the devices here, once, outside of all loops.
    params, hidden, labels, weights = vary_together((params, hidden, labels, weights))
    features, words = params["kernel"].shape
    chunks = options.chunk_size, options.vocab_chunk_size
    sizes = _block_sizes(labels.shape[0], features, words, *chunks)
    is_half = jnp.finfo(hidden.dtype).bits < 32
    head = Head(*options[:4], word_axes, *sizes, is_half)
    if word_axes:
        labels -= jax.lax.axis_index(word_axes) * words
    if options.reduction == "none":
        losses: Any = losses_of_steps(head, params, hidden, labels)
        return jnp.reshape(jnp.where(weights > 0, losses, 0), valid.shape)
    loss = weighted_loss(head, params, hidden, labels, weights)
    return jax.lax.psum(loss, step_axes) if step_axes else loss


def _flatten_steps(hidden, labels, valid, words: int) -> tuple[Any, Any]:
    """`(hidden, labels)` with all steps on one axis.

    Neither NaN nor a gradient passes where a step is masked. A label outside the
    vocabulary makes both NaN.
    """
    over_features = lambda steps: over_trailing_axes(steps, hidden.ndim)
    unknown = valid & ((labels < 0) | (labels >= words))
    hidden = jnp.where(over_features(valid), hidden, 0)
    # In this order, since `jax_debug_nans` stops at any NaN.
    hidden = jnp.where(over_features(unknown), jnp.nan, hidden)
    labels = jnp.ravel(jnp.where(valid, labels, 0))
    return jnp.reshape(hidden, (labels.shape[0], hidden.shape[-1])), labels


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
