"""`linear_log_probs`: log-probabilities and entropies of a softmax head."""

from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from tdjax._cross_entropy.blocks import statistics_of_steps
from tdjax._cross_entropy.checks import (
    check_labels,
    check_steps,
    require_capacity,
    require_chunks,
    require_class,
    require_soft_cap,
    require_temperature,
)
from tdjax._cross_entropy.head import require_head, words_of
from tdjax._cross_entropy.loss import Options, Scalar, head_of, run
from tdjax._cross_entropy.steps import (
    Inputs,
    flatten,
    known_labels,
    unflatten,
    vocabulary_of,
)
from tdjax._mesh import vary_together


class LogProbs(NamedTuple):
    """What `linear_log_probs` returns; both have the shape of labels."""

    log_probs: Float[Array, "*steps"]
    entropies: Float[Array, "*steps"]


def linear_log_probs(
    params: Any,
    hidden: Float[Array | np.ndarray, "*steps features"],
    labels: Integer[Array | np.ndarray, "*steps"],
    *,
    mask: Bool[Array | np.ndarray, "*steps"] | None = None,
    temperature: Scalar = 1.0,
    logits_soft_cap: int | float | None = None,
    ignore_class: int | None = None,
    capacity: int | None = None,
    chunk_size: int | Literal["auto"] | None = None,
    vocab_chunk_size: int | None = None,
    max_logits_bytes: int | None = None,
    sharding: PartitionSpec | None = None,
    kernel_sharding: PartitionSpec | None = None,
) -> LogProbs:
    """The log-probabilities of labels and the entropies, without storing the logits.

    Equals `jax.nn.log_softmax(dense(params, hidden) / temperature)` at the labels, and
    the entropies of these distributions. Both have right gradients by `params` and
    `hidden`, as policy gradients, distillation and scoring need them. Only one block of
    logits exists at a time; the gradient computes the logits once more. Call it under
    `jit`.

    Args:
      params, hidden, labels, mask: as in `tdjax.linear_cross_entropy`.
      temperature: divides the logits, after the soft cap. It may be a scalar that is
        only known at run time, and has no gradient.
      logits_soft_cap, ignore_class: as in `tdjax.linear_cross_entropy`.
      capacity: compute the valid steps only, at most this many. Steps beyond the
        capacity become NaN.
      chunk_size, vocab_chunk_size, max_logits_bytes, sharding, kernel_sharding: as in
        `tdjax.linear_cross_entropy`.

    Returns:
      `(log_probs, entropies)`, `(...)` each, in nats; 0 at masked steps. float32, or
      float64 if the inputs are.

    Raises:
      TypeError, ValueError: as `tdjax.linear_cross_entropy`.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> head = tdjax.init_dense(jax.random.key(0), 8, 1000)
      >>> hidden, actions = jnp.zeros((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> log_probs, entropies = tdjax.linear_log_probs(head, hidden, actions)
      >>> log_probs.shape, round(float(entropies[0, 0]), 3)  # the log of 1000
      ((2, 5), 6.908)
    """
    params, hidden = require_head(params, hidden, labels)
    words = words_of(params)
    check_steps(hidden, labels, mask, words)
    check_labels(labels, mask, None, require_class(ignore_class), words)
    scalars = {
        "label_smoothing": None,
        "z_loss": None,
        "temperature": require_temperature(temperature),
    }
    options = Options(
        "linear_log_probs", words, "none", False,
        *require_capacity(capacity, labels, mask, None, ignore_class),
        require_soft_cap(logits_soft_cap),
        require_chunks(chunk_size, vocab_chunk_size, max_logits_bytes),
    )  # fmt: skip
    labels = known_labels(labels, ignore_class, words)
    inputs = Inputs(params, None, hidden, labels, mask, None, scalars)
    spec = LogProbs._make(["steps", "steps"])
    return run(options, inputs, _log_probs_of_steps, spec, sharding, kernel_sharding)


def _log_probs_of_steps(
    options: Options, inputs: Inputs, step_axes: tuple[str, ...], word_axes
) -> LogProbs:
    """Of the steps that one device has, from the words that it has."""
    steps = flatten(inputs, options.words, options.capacity)
    inputs, steps = vary_together((inputs, steps))
    vocabulary, labels = vocabulary_of(inputs, steps.weights.dtype), steps.labels
    if word_axes:
        labels = labels - jax.lax.axis_index(word_axes) * vocabulary.words
    wants = frozenset({"entropies"})
    head = head_of(options, steps, vocabulary, wants, False, word_axes)
    statistics: Any = statistics_of_steps(head, vocabulary, steps.hidden, labels)
    of_steps = statistics.log_probs, statistics.entropies
    return LogProbs._make(unflatten(steps, x) for x in of_steps)
