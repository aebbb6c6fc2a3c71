"""One block of logits, and what is kept of each of its rows.

A block has the shape `(rows, words)`, and its rows are steps. Of each row a few numbers
are enough for losses, log-probabilities, entropies and predictions: its `Statistics`.
They come from the row's sums over its words (`Sums`), which words in
chunks add up with a running maximum (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867), and which devices that split the words add up by one
`psum` (`of_all_words`).

What must hold: only inputs, operands of matrix products, and what is returned, are
narrower than float32. A word that the bias bans (-inf) has probability 0 and no
gradient, never NaN.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax._checks import at_least_float32
from tdjax._cross_entropy.chunks import over_words, slice_axis
from tdjax._cross_entropy.products import (
    AXIS_OF_WORDS,
    Params,
    times_kernel,
    weight_name,
)
from tdjax._cross_entropy.sizes import Sizes


class Head(NamedTuple):
    """What is the same for all rows, and known when the program is built.

    Attributes:
      logits_soft_cap: as in `linear_cross_entropy`.
      words: those of all devices.
      word_axes: the mesh axes that split the words.
      wants: which statistics are asked for beside log-probabilities and normalizers:
        "mean_log_probs", "entropies", "predictions".
      is_plain: whether only the log-probabilities have gradients.
      sizes: the sizes of the blocks on a CPU, and those elsewhere.
      on_cpu: whether this is compiled for a CPU. There, XLA runs one pass over a block
        after the other, so that what is computed is kept. Elsewhere it is cheaper to
        compute an exponential again than to store it.
    """

    logits_soft_cap: float | None
    words: int
    word_axes: tuple[str, ...]
    wants: frozenset[str]
    is_plain: bool
    sizes: tuple[Sizes, Sizes]
    on_cpu: bool = True

    @property
    def block(self) -> Sizes:
        """The sizes of the blocks."""
        return self.sizes[0] if self.on_cpu else self.sizes[1]


class Vocabulary(NamedTuple):
    """The arrays that all rows share.

    Attributes:
      params: `{"kernel": (features, words)}` or `{"embedding": (words, features)}`, or
        both, and maybe `"bias": (words,)`.
      class_weights: `(words,)` or None; they weigh the mean of log-probabilities.
      mean_weight: `()`, the mean of the class weights over the words of all devices.
      temperature: `()` or None; divides the logits.
    """

    params: Params
    class_weights: Any
    mean_weight: Any
    temperature: Any

    @property
    def weight_sum(self):
        """The sum of the class weights of these words."""
        weights = self.class_weights
        return float(self.words) if weights is None else jnp.sum(weights)

    @property
    def words(self) -> int:
        name = weight_name(self.params)
        return self.params[name].shape[AXIS_OF_WORDS[name]]

    def take(self, start, count: int) -> "Vocabulary":
        """Only `count` words from `start` on."""
        arrays = {**self.params, "class_weights": self.class_weights}
        taken = {
            name: None
            if x is None
            else slice_axis(x, start, count, AXIS_OF_WORDS[name])
            for name, x in arrays.items()
        }
        class_weights = taken.pop("class_weights")
        return self._replace(params=taken, class_weights=class_weights)


class Block(NamedTuple):
    """`(rows, words)` logits, after cap and temperature, and the labels' logits.

    `label_logit` is NaN where the label is not among the block's words.
    """

    logits: Any
    label_logit: Any


class Sums(NamedTuple):
    """Of each row, over the words seen so far.

    Attributes:
      shift: the largest logit, or 0 if every word is banned.
      exp_sum: the sum of `exp(logit - shift)`.
      label_logit: NaN until the label is among the words.
      logit_sum: the sum of `class_weight * (logit - shift)`, or None.
      spread: the sum of `exp(logit - shift) * (logit - shift)`, or None.
      prediction: the first of the most likely words, or None.
      weight_sum: `()`, the sum of the class weights so far, or None.

    Shift and sum are kept apart: at logits of 1e5 their combined log has lost the
    digits that tell a probability of 1/2 from one of 1/3.
    """

    shift: Any
    exp_sum: Any
    label_logit: Any
    logit_sum: Any = None
    spread: Any = None
    prediction: Any = None
    weight_sum: Any = None

    def statistics(self, head: Head, vocabulary: Vocabulary) -> "Statistics":
        log_sum = jnp.log(self.exp_sum)
        mean = None
        if self.logit_sum is not None:
            mean = self.logit_sum / head.words - vocabulary.mean_weight * log_sum
        entropy = None
        if self.spread is not None:
            entropy = log_sum - self.spread / self.exp_sum
        return Statistics(
            log_probs=(self.label_logit - self.shift) - log_sum,
            log_normalizers=log_sum + self.shift,
            mean_log_probs=mean,
            entropies=entropy,
            predictions=self.prediction,
        )


class Statistics(NamedTuple):
    """`(rows,)` each; None for what is not asked for.

    Attributes:
      log_probs: of the labels.
      log_normalizers: the log of the softmax's denominator.
      mean_log_probs: the mean over all words of `class_weight * log_prob`.
      entropies: of the words' distribution, in nats.
      predictions: the most likely words, int32.
    """

    log_probs: Any
    log_normalizers: Any
    mean_log_probs: Any = None
    entropies: Any = None
    predictions: Any = None


def block_of(head: Head, vocabulary: Vocabulary, hidden, labels) -> Block:
    """The logits of all words of `vocabulary`; `labels` count from its first word."""
    params = vocabulary.params
    products = times_kernel(hidden, params)
    label_logit = at_labels(products, labels).get(mode="fill", fill_value=0)
    bias = params.get("bias")
    if bias is not None:
        if head.on_cpu:
            # Reading the labels' logits first lets the bias be added in place.
            both = products, label_logit
            products, label_logit = jax.lax.optimization_barrier(both)
        label_logit = label_logit + bias.at[labels].get(mode="clip")
        products = products + bias[None, :]
    finish = functools.partial(_finish, head, vocabulary.temperature)
    # After the cap, whose derivative at NaN would be NaN.
    inside = (labels >= 0) & (labels < products.shape[1])
    return Block(finish(products), jnp.where(inside, finish(label_logit), jnp.nan))


def _finish(head: Head, temperature, logits):
    if head.logits_soft_cap is not None:
        logits = head.logits_soft_cap * jnp.tanh(logits / head.logits_soft_cap)
    return logits if temperature is None else logits / temperature


def slope_of_cap(head: Head, temperature, logits):
    """The derivative of the soft cap, from the logits after cap and temperature."""
    cap = head.logits_soft_cap
    assert cap is not None
    scale = 1 / cap if temperature is None else temperature / cap
    return 1 - (logits * scale) ** 2


def sums_of_block(head: Head, vocabulary: Vocabulary, block: Block) -> tuple[Any, Sums]:
    """`(exponentials, sums)` of a block that has all words of this device."""
    largest, prediction = _largest(head, block.logits)
    everywhere = _largest_of_all(head, largest)
    shift = _finite(everywhere)
    exponentials = jnp.exp(block.logits - shift[:, None])
    exp_sum = exponentials.sum(-1)
    if head.on_cpu:
        # Else XLA computes the exponentials again for the gradient.
        both = exponentials, exp_sum
        exponentials, exp_sum = jax.lax.optimization_barrier(both)
    sums = Sums(shift, exp_sum, block.label_logit)
    sums = _add_wanted(head, vocabulary, sums, block, exponentials)
    sums = sums._replace(prediction=prediction)
    return exponentials, _of_all_words(
        head, vocabulary.words, sums, largest, everywhere
    )


def sums_over_words(
    head: Head, vocabulary: Vocabulary, hidden, labels, size: int
) -> Sums:
    """The sums from blocks of `size` words, with a running maximum."""

    def add_word_chunk(carry, start, count):
        largest, sums = carry
        words = vocabulary.take(start, count)
        block = block_of(head, words, hidden, labels - start)
        of_block, prediction = _largest(head, block.logits)
        larger = jnp.maximum(largest, of_block)
        shift = _finite(larger)
        inside = (labels >= start) & (labels < start + count)
        label_logit = jnp.where(inside, block.label_logit, sums.label_logit)
        if prediction is not None:
            is_new = of_block > largest
            prediction = jnp.where(is_new, start + prediction, sums.prediction)
        sums = _shifted(sums, largest, shift)._replace(label_logit=label_logit)
        exponentials = jnp.exp(block.logits - shift[:, None])
        sums = sums._replace(exp_sum=sums.exp_sum + exponentials.sum(-1))
        sums = _add_wanted(head, words, sums, block, exponentials)
        return larger, sums._replace(prediction=prediction)

    zeros = jnp.zeros_like(labels, dtype=at_least_float32(hidden.dtype))
    optional = {
        "logit_sum": zeros if "mean_log_probs" in head.wants else None,
        "spread": zeros if "entropies" in head.wants else None,
        "prediction": labels * 0 if "predictions" in head.wants else None,
        "weight_sum": jnp.sum(zeros) if "mean_log_probs" in head.wants else None,
    }
    # A label outside the vocabulary leaves NaN.
    start = zeros - jnp.inf, Sums(zeros, zeros, zeros + jnp.nan, **optional)
    largest, sums = over_words(add_word_chunk, start, vocabulary.words, size)
    everywhere = _largest_of_all(head, largest)
    if head.word_axes:
        sums = _shifted(sums, largest, _finite(everywhere))
    return _of_all_words(head, vocabulary.words, sums, largest, everywhere)


def _largest(head: Head, logits):
    """`(largest, prediction)` of each row, without a gradient; the second maybe None.

    The prediction is looked up in the one group of words that has the largest logit,
    since a maximum with its place takes ten times as long as one without, on a CPU.
    """
    logits = jax.lax.stop_gradient(logits)
    if "predictions" not in head.wants:
        return logits.max(-1), None
    rows, words = logits.shape
    group = _group_size(words)
    of_groups = jnp.reshape(logits, (rows, words // group, group)).max(-1)
    largest = of_groups.max(-1)
    first = _first_equal(of_groups, largest) * group
    columns = first[:, None] + jnp.arange(group, dtype=jnp.int32)[None, :]
    of_group = jnp.take_along_axis(logits, columns, axis=1)
    return largest, first + _first_equal(of_group, largest)


def _group_size(words: int) -> int:
    """The words in a group, such that groups and words in one are equally many."""
    root = int(words**0.5)
    return words // next(n for n in range(root, 0, -1) if words % n == 0)


def _first_equal(x, value):
    """The first column of each row that has the row's value, 0 if none has."""
    columns = x.shape[1]
    column = jnp.arange(columns, dtype=jnp.int32)[None, :]
    first = jnp.where(x == value[:, None], column, columns).min(-1)
    return jnp.where(first == columns, 0, first)


def _shifted(sums: Sums, largest, shift) -> Sums:
    """The same sums, whose largest logit is known, relative to another shift."""
    ratio = jnp.exp(largest - shift)
    spread = sums.spread
    if spread is not None:
        spread = ratio * (spread + (sums.shift - shift) * sums.exp_sum)
    logit_sum = sums.logit_sum
    if logit_sum is not None:
        logit_sum = logit_sum + (sums.shift - shift) * sums.weight_sum
    exp_sum = ratio * sums.exp_sum
    return sums._replace(
        shift=shift, exp_sum=exp_sum, spread=spread, logit_sum=logit_sum
    )


def _add_wanted(head: Head, vocabulary, sums: Sums, block: Block, exponentials) -> Sums:
    """Adds the block's logits, and its spread, where they are asked for."""
    if not head.wants & {"mean_log_probs", "entropies"}:
        return sums
    logit_sum, spread, weight_sum = sums.logit_sum, sums.spread, sums.weight_sum
    shifted = block.logits - sums.shift[:, None]
    if "mean_log_probs" in head.wants:
        of_block = weighed(vocabulary.class_weights, shifted).sum(-1)
        logit_sum = of_block if logit_sum is None else logit_sum + of_block
        if weight_sum is not None:
            weight_sum = weight_sum + vocabulary.weight_sum
    if "entropies" in head.wants:
        of_block = (exponentials * finite_or_zero(shifted)).sum(-1)
        spread = of_block if spread is None else spread + of_block
    return sums._replace(logit_sum=logit_sum, spread=spread, weight_sum=weight_sum)


def weighed(class_weights, logits):
    """The logits times class weights; 0 for words of weight 0, which may be banned."""
    if class_weights is None:
        return logits
    weights = class_weights[None, :]
    return jnp.where(weights == 0, 0, weights * logits)


def finite_or_zero(shifted):
    """0 for a banned word, which has no share in the entropy."""
    return jnp.where(jnp.isneginf(shifted), 0, shifted)


def _largest_of_all(head: Head, largest):
    """Each row's largest logit, of the words of all devices."""
    return jax.lax.pmax(largest, head.word_axes) if head.word_axes else largest


def _of_all_words(head: Head, words: int, sums: Sums, largest, everywhere) -> Sums:
    """The sums over the words of all devices, from those of this device's `words`.

    Only one device has the label of a row among its words.
    """
    axes = head.word_axes
    if not axes:
        return sums._replace(weight_sum=None)
    label_logit = jnp.where(jnp.isnan(sums.label_logit), 0, sums.label_logit)
    added = (sums.exp_sum, label_logit, sums.logit_sum, sums.spread)
    exp_sum, label_logit, logit_sum, spread = jax.lax.psum(added, axes)
    prediction = sums.prediction
    if prediction is not None:
        prediction = prediction + jax.lax.axis_index(axes) * words
        candidate = jnp.where(largest == everywhere, prediction, head.words)
        prediction = jax.lax.pmin(candidate, axes)
    return Sums(sums.shift, exp_sum, label_logit, logit_sum, spread, prediction)


def _finite(largest):
    """0 for minus infinity, the largest logit if the bias bans every word."""
    return jnp.where(jnp.isneginf(largest), 0, largest)


def at_labels(x, labels):
    """`x.at[row, labels[row]]` for every row."""
    # Negative indices would count from the end.
    columns = jnp.where(labels < 0, x.shape[1], labels)
    return x.at[jnp.arange(x.shape[0]), columns]
