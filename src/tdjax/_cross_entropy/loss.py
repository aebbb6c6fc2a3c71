"""`linear_cross_entropy`: its arguments, and the loss of the steps of one device.

`head` and `checks` say what is accepted, `mesh` which part of it a device gets, `steps`
which steps count, and `blocks` computes the losses and gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from tdjax._cross_entropy.blocks import statistics_of_steps, weighted_loss
from tdjax._cross_entropy.checks import (
    check_axis_name,
    check_capacity,
    check_class_weights,
    check_labels,
    check_reduction,
    check_steps,
    check_weights,
    forward_mode_refused,
    require_capacity,
    require_chunks,
    require_class,
    require_scalar,
    require_soft_cap,
)
from tdjax._cross_entropy.head import require_head, words_of
from tdjax._cross_entropy.logits import Head, Statistics
from tdjax._cross_entropy.losses import Terms, weighted_losses
from tdjax._cross_entropy.mesh import layout_on_mesh
from tdjax._cross_entropy.sizes import Chunks, block_sizes
from tdjax._cross_entropy.steps import (
    FlatSteps,
    Inputs,
    flatten,
    known_labels,
    nan_unless_all_fit,
    unflatten,
    vocabulary_of,
    weights_of_labels,
)
from tdjax._mesh import names_in, vary_together

Scalar = int | float | Array | np.ndarray


class Aux(NamedTuple):
    """What `linear_cross_entropy(..., has_aux=True)` knows of each step.

    All have the shape of labels, zeros at masked steps, and no gradient.

    Attributes:
      log_probs: of the labels, without smoothing and weights. The exponential of their
        negative mean is the perplexity.
      log_normalizers: the logs of the softmax's denominators.
      predictions: the most likely words, int32; the first of equally likely ones.
      correct: bool, whether the label is predicted.
      z_losses: `z_loss * log_normalizers ** 2`.
    """

    log_probs: Float[Array, "*steps"]
    log_normalizers: Float[Array, "*steps"]
    predictions: Integer[Array, "*steps"]
    correct: Bool[Array, "*steps"]
    z_losses: Float[Array, "*steps"]


def linear_cross_entropy(
    params: Any,
    hidden: Float[Array | np.ndarray, "*steps features"],
    labels: Integer[Array | np.ndarray, "*steps"],
    *,
    mask: Bool[Array | np.ndarray, "*steps"] | None = None,
    weights: Float[Array | np.ndarray, "*steps"] | None = None,
    class_weights: Float[Array | np.ndarray, " words"] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    logits_soft_cap: int | float | None = None,
    ignore_class: int | None = None,
    capacity: int | None = None,
    has_aux: bool = False,
    chunk_size: int | Literal["auto"] | None = None,
    vocab_chunk_size: int | None = None,
    max_logits_bytes: int | None = None,
    sharding: PartitionSpec | None = None,
    kernel_sharding: PartitionSpec | None = None,
    axis_name: Any = None,
) -> Any:
    """The cross-entropy of `dense(params, hidden)`, without storing the logits.

    Equals `optax.softmax_cross_entropy_with_integer_labels` of a Dense head's logits,
    averaged over the valid steps. But only one block of logits exists at a time, and
    `"mean"` and `"sum"` compute their gradients in the same pass. Call it under `jit`:
    otherwise its loops are compiled at every call. See docs/loss.md for memory,
    precision and transformations.

    Args:
      params: `{"kernel": (features, words)}` as of a Dense layer, or `{"embedding":
        (words, features)}` as of an Embed, for tied embeddings; with either `"bias":
        (words,)` is optional. Or an `nnx.Linear`, an `nnx.Embed`, or the state of one.
      hidden: `(..., features)`, the inputs of the head, such as `(batch, time,
        features)`.
      labels: `(...)`, integers from 0 to `words - 1`; anything at masked and ignored
        steps. Inside `jit`, where values can't be checked, a label outside this range
        makes the loss and its gradient NaN.
      mask: `(...)`, bool, True at the valid steps; all by default. Masked steps have
        loss 0 and contribute no gradient, even where `hidden` is NaN.
      weights: `(...)`, floats that multiply the losses; 1 by default. A step of weight
        0 is masked. They have a gradient.
      class_weights: `(words,)`, floats: each word's weight in the cross-entropy, in its
        smoothing too, as in PyTorch. Without a gradient.
      reduction: `"mean"` over the valid steps (0 if there are none), or with weights
        their sum divided by that of `weights * class_weights[labels]` (if it is not 0);
        `"sum"`; or `"none"` for the loss of each step, whose gradient computes the
        logits again.
      label_smoothing: from 0 to 1, the share of each label's probability that is
        spread over all words, as in `optax.smooth_labels`. It may be a scalar that is
        only known at run time, such as a schedule's.
      z_loss: weight of the squared log of the softmax's denominator, added to each
        loss (Chowdhery et al. 2022). It may be known at run time only.
      logits_soft_cap: replaces the logits by `cap * tanh(logits / cap)` (Bello et al.
        2016).
      ignore_class: steps with this label are masked too.
      capacity: compute the valid steps only, at most this many. If there are more, the
        loss is NaN; with `"none"`, the losses beyond the capacity.
      has_aux: whether to return `(loss, aux)` with the log-probabilities, predictions
        and so on of each step (docs/loss.md#what-else-it-knows).
      chunk_size: steps per block. By default, or `"auto"`, as many as the largest of
        these three has: a ninth of all logits; 32 MB of them; 256 steps if these are at
        most 128 MB (on accelerators an eighth, 512 MB, 1024 steps, 1 GB). But not more
        than 512 steps (8192), or the number of features if that is larger.
      vocab_chunk_size: words per block; all by default, except for vocabularies so
        large that a block would have fewer than 256 steps. Chunks of words make the
        gradient compute the logits twice.
      max_logits_bytes: the most bytes that the logits of a block may take, in place of
        both chunk sizes. No block has fewer than 128 words.
      sharding: `P(batch, time)`, the mesh axes that split the axes of `labels`, on the
        mesh in context (`jax.set_mesh`). Each device computes the losses of its own
        steps. `capacity` and the sizes of blocks are those of one device. By default it
        is what the types say under explicit axes, and the compiler's choice under
        automatic ones.
      kernel_sharding: the mesh axes that split the kernel, `P(features, words)`, or the
        embedding, `P(words, features)`; those of words split the bias too. With words
        split, each device has its own words and only a few numbers of each step are
        sent, and one gradient by `hidden`. Axes of features, and those that split steps
        too, are gathered (FSDP). See docs/mesh.md. By default as `sharding`.
      axis_name: inside a `jax.shard_map` of your own, the mesh axes that split the
        steps: `"mean"` and `"sum"` are then those of all devices. With its default
        `check_vma=True`, gradients by shared params are summed over them already.

    Returns:
      The mean or sum, `()`, or the losses, `(...)`; float32, or float64 if the inputs
      are. With `has_aux`, a pair of this and a named tuple of arrays, `(...)`:
      `log_probs`, `log_normalizers`, `predictions`, `correct`, `z_losses`.

    Raises:
      TypeError: if an argument is of the wrong kind, or in forward mode (`jax.jvp`);
        under `jit` with JAX's own message about `custom_vjp`.
      ValueError: if shapes do not match, an option is out of range, an unmasked label
        is outside the vocabulary, more steps are known to be valid than `capacity`, or
        a sharding does not fit the mesh or the sizes.

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
    words = words_of(params)
    check_steps(hidden, labels, mask, words)
    check_weights(weights, labels)
    check_class_weights(class_weights, words)
    check_reduction(reduction)
    scalars = {
        "label_smoothing": require_scalar("label_smoothing", label_smoothing, most=1),
        "z_loss": require_scalar("z_loss", z_loss),
        "temperature": None,
    }
    check_labels(labels, mask, weights, require_class(ignore_class), words)
    options = Options(
        "linear_cross_entropy", words, reduction, bool(has_aux),
        *require_capacity(capacity, labels, mask, weights, ignore_class),
        require_soft_cap(logits_soft_cap),
        require_chunks(chunk_size, vocab_chunk_size, max_logits_bytes),
    )  # fmt: skip
    labels = known_labels(labels, ignore_class, words)
    inputs = Inputs(params, class_weights, hidden, labels, mask, weights, scalars)
    if axis_name is not None:
        check_axis_name(axis_name, reduction)
    spec: Any = "steps" if reduction == "none" else "sum"
    if has_aux:
        spec = spec, Aux._make(["steps"] * len(Aux._fields))
    shardings = sharding, kernel_sharding, axis_name
    return run(options, inputs, _loss_of_steps, spec, *shardings)


class Options(NamedTuple):
    """What is the same on all devices, and known when the program is built."""

    name: str
    words: int
    reduction: str
    has_aux: bool
    capacity: int | None
    valid_steps: int | None
    logits_soft_cap: float | None
    chunks: Chunks


def run(
    options: Options, inputs: Inputs, of_steps: Callable, out_spec: Any,
    sharding: Any, kernel_sharding: Any, axis_name: Any = None,
) -> Any:  # fmt: skip
    """`of_steps(options, inputs, step_axes, word_axes)`, on a mesh if there is one."""
    call = functools.partial(of_steps, options)
    inputs = jax.tree.map(jnp.asarray, inputs)
    with forward_mode_refused(options.name):
        layout = layout_on_mesh(sharding, kernel_sharding, inputs)
        outside = names_in(axis_name)
        if layout is None:
            check_capacity(options.capacity, options.valid_steps)
            return call(inputs, outside, ())
        return layout.run(call, out_spec, outside, inputs)


def _loss_of_steps(
    options: Options, inputs: Inputs, step_axes: tuple[str, ...], word_axes
) -> Any:
    """The loss of the steps that one device has, and of the words that it has.

    The devices along the mesh axes `step_axes` have other steps, those along
    `word_axes` other words.
    """
    steps = flatten(inputs, options.words, options.capacity)
    # Their gradients are summed over the devices here, once, outside of all loops.
    inputs, steps = vary_together((inputs, steps))
    wide = steps.weights.dtype
    vocabulary = vocabulary_of(inputs, wide)
    labels, of_labels = steps.labels, None
    if word_axes:
        labels = labels - jax.lax.axis_index(word_axes) * vocabulary.words
    if vocabulary.class_weights is not None:
        of_labels = weights_of_labels(vocabulary.class_weights, labels, word_axes)
        mean_weight = jnp.sum(vocabulary.class_weights) / options.words
        mean_weight = jax.lax.psum(mean_weight, word_axes) if word_axes else mean_weight
        vocabulary = vocabulary._replace(mean_weight=mean_weight)
    as_wide = lambda x: None if x is None else jnp.asarray(x, wide)
    scalars = {name: as_wide(x) for name, x in inputs.scalars.items()}
    smoothing, z_loss = scalars["label_smoothing"], scalars["z_loss"]
    terms = Terms(of_labels, smoothing, z_loss)
    wants = {"mean_log_probs"} if smoothing is not None else set()
    wants |= {"predictions"} if options.has_aux else set()
    is_plain = smoothing is None and z_loss is None
    head = head_of(options, steps, vocabulary, frozenset(wants), is_plain, word_axes)
    if options.reduction == "none":
        statistics: Any = statistics_of_steps(head, vocabulary, steps.hidden, labels)
        losses = weighted_losses(steps.weights, terms, statistics)
        loss = unflatten(steps, losses)
    else:
        weights = steps.weights
        if options.reduction == "mean":
            weights = _over_their_sum(weights, of_labels, step_axes)
        results: Any = weighted_loss(
            head, vocabulary, steps.hidden, labels, weights, terms
        )
        loss, statistics = results
        loss = nan_unless_all_fit(steps, loss)
        loss = jax.lax.psum(loss, step_axes) if step_axes else loss
    return (loss, _aux(steps, statistics, z_loss)) if options.has_aux else loss


def head_of(
    options: Options,
    steps: FlatSteps,
    vocabulary: Any,
    wants: frozenset[str],
    is_plain: bool,
    word_axes: tuple[str, ...],
) -> Head:
    itemsize = steps.weights.dtype.itemsize
    rows, features = steps.hidden.shape
    chunks, words = options.chunks, vocabulary.words
    sizes = block_sizes(rows, features, words, chunks, itemsize)
    cap, words = options.logits_soft_cap, options.words
    return Head(cap, words, word_axes, wants, is_plain, sizes)


def _over_their_sum(weights, of_labels, step_axes: tuple[str, ...]):
    """The weights of a mean, over the steps of all devices."""
    counted = weights if of_labels is None else weights * of_labels
    total = jnp.sum(counted)
    total = jax.lax.psum(total, step_axes) if step_axes else total
    return weights / jnp.where(total == 0, 1, total)


def _aux(steps: FlatSteps, statistics: Statistics, z_loss) -> Aux:
    still = jax.lax.stop_gradient(statistics)
    normalizers, predictions = still.log_normalizers, still.predictions
    z_losses = jnp.zeros_like(normalizers)
    if z_loss is not None:
        z_losses = jax.lax.stop_gradient(z_loss) * normalizers**2
    correct = predictions == steps.labels
    of_steps = [still.log_probs, normalizers, predictions, correct, z_losses]
    return Aux._make([unflatten(steps, x) for x in of_steps])
