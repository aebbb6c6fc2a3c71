"""The cross-entropy of a softmax head and its gradients, one block of logits at a time.

In: the head's params, `hidden` (steps, features) and `labels` (steps,), already checked
and flattened by `loss`. Out: the loss of every step (`losses_of_steps`) or a weighted
sum of them (`weighted_loss`), each with a backward pass of its own.

Steps go in chunks of rows, and so may the words: a block of logits has the shape
`(chunk_size, vocab_chunk_size)`, and only one exists at a time. For each row chunk:

1. `_block`: the logits of the block, with bias and soft cap.
2. `_normalizer`: each row's sum of exponentials. Over word chunks it is summed with a
   running maximum (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
3. `_losses`: the losses, from the normalizer alone.
4. `_d_logits`, then `_add_products`: the gradients by the logits, and from them those
   by params, summed over all blocks, and by `hidden`.

`weighted_loss` does all four in its forward pass, while the logits exist; its backward
pass only scales the gradients (Hsu et al. 2024, https://arxiv.org/abs/2410.10989). With
the words in chunks the logits are computed twice, for step 2 and again for step 4
(Wijmans et al. 2024, https://arxiv.org/abs/2411.09009).

With the words split over devices, each runs this for its own words, `params` and
`labels` being those of the device. The normalizer then becomes that of all words
(`_of_all_words`): three numbers of each row are sent. A device's gradients are partial
sums, which the caller adds up.

What must hold: only inputs, operands of matrix products, and what is returned, are
narrower than float32.
A word that the bias bans (-inf) has probability 0 and no gradient, never NaN.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax._checks import at_least_float32
from tdjax._cross_entropy.chunks import (
    add_at,
    in_chunks,
    join_chunks,
    over_words,
    slice_columns,
)

Params = dict[str, Any]
ONE_PER_ROW: dict[str, Any] = {
    "mode": "drop",
    "unique_indices": True,
    "indices_are_sorted": True,
}


class Head(NamedTuple):
    """The options: the loss of one step, the words, and the sizes of the blocks.

    With logits z and label y, the loss is `lse(z) - (1 - label_smoothing) * z[y] -
    label_smoothing * mean(z) + z_loss * lse(z) ** 2`, where `lse` is log-sum-exp.
    `words` are those of all devices, `word_axes` the mesh axes that split them.
    """

    label_smoothing: float
    z_loss: float
    logits_soft_cap: float | None
    words: int
    word_axes: tuple[str, ...]
    chunk_size: int
    vocab_chunk_size: int
    forward_chunk_size: int
    forward_vocab_chunk_size: int
    is_half: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(head: Head, params: Params, hidden, labels, weights):
    """The sum of `weights * losses`; the forward pass computes its gradients."""
    return _weighted_sum(weights, _forward(head, params, hidden, labels))


def _weighted_loss_forward(head, params, hidden, labels, weights):
    losses, gradients = _losses_and_gradients(head, params, hidden, labels, weights)
    like = jax.tree.map(_empty, (params, hidden))
    return _weighted_sum(weights, losses), (gradients, losses, like)


def _weighted_loss_backward(head, residuals, cotangent):
    gradients, losses, like = residuals
    total = _of_all_devices(head, cotangent)

    def scale(gradient, x):
        return (total * gradient.astype(total.dtype)).astype(x.dtype)

    d_params, d_hidden = jax.tree.map(scale, gradients, like)
    return d_params, d_hidden, None, cotangent * losses


def _weighted_sum(weights, losses):
    # A masked step may have an infinite loss, where the bias bans its label.
    return jnp.sum(jnp.where(weights == 0, 0, weights * losses))


def _of_all_devices(head: Head, cotangent):
    """Of losses that the devices along `word_axes` share, each has a part of it."""
    return jax.lax.psum(cotangent, head.word_axes) if head.word_axes else cotangent


def _empty(x):
    """An empty array that only records the dtype of `x`."""
    return jnp.zeros((0,), x.dtype)


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses_of_steps(head: Head, params: Params, hidden, labels):
    """The loss of every step; the backward pass computes the logits again."""
    return _forward(head, params, hidden, labels)


def _losses_forward(head, params, hidden, labels):
    return _forward(head, params, hidden, labels), (params, hidden, labels)


def _losses_backward(head, residuals, cotangents):
    params, hidden, labels = residuals
    cotangents = _of_all_devices(head, cotangents)
    _, gradients = _losses_and_gradients(head, params, hidden, labels, cotangents)
    cast = lambda gradient, x: gradient.astype(x.dtype)
    return *jax.tree.map(cast, gradients, (params, hidden)), None


losses_of_steps.defvjp(_losses_forward, _losses_backward)


def _forward(head: Head, params: Params, hidden, labels):
    """`(steps,)` losses without gradients."""
    size = head.forward_vocab_chunk_size

    def chunk_losses(rows):
        hidden, labels = rows
        normalizer = _normalizer_over_words(head, params, hidden, labels, size)
        return _losses(head, normalizer)

    chunks = in_chunks((hidden, labels), head.forward_chunk_size)
    return join_chunks(jax.lax.map(chunk_losses, chunks), labels.shape[0])


def _losses_and_gradients(head: Head, params: Params, hidden, labels, weights):
    """`(losses, (d_params, d_hidden))`, the gradients those of the weighted sum.

    Weights are first scaled to at most 1. The tiny weights of a mean over many steps
    would make half-precision `d_logits` of small probabilities vanish. Float16
    gradients stay float32 here, so that loss scaling can still save small ones.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights), initial=0))
    largest = jnp.where(largest > 0, largest, 1)
    relative = weights / largest
    # The kernel's gradient is (words, features) until the end: a word chunk is rows.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x.T, dtype=weights.dtype), params)

    def add_chunk(d_params, rows):
        d_params, d_hidden, losses = _add_gradients(head, params, d_params, *rows)
        return d_params, (d_hidden, losses)

    chunks = in_chunks((hidden, labels, relative), head.chunk_size)
    # Under a second derivative, store no chunk's logits either.
    body = jax.checkpoint(add_chunk, prevent_cse=False)
    d_params, (d_hidden, losses) = jax.lax.scan(body, zeros, chunks)
    rows = labels.shape[0]
    d_hidden, losses = join_chunks(d_hidden, rows), join_chunks(losses, rows)

    def unscale(gradient, x):
        keep_wide = x.dtype == jnp.float16
        return (largest * gradient).astype(gradient.dtype if keep_wide else x.dtype)

    d_params = jax.tree.map(lambda d_x, x: unscale(d_x.T, x), d_params, params)
    return losses, (d_params, unscale(d_hidden, hidden))


def _add_gradients(head: Head, params, d_params, hidden, labels, weights):
    """Of one row chunk, `(d_params, d_hidden, losses)`: `d_params` is added to."""
    words, size = _words(params), head.vocab_chunk_size
    if size >= words:
        block = _block(head, params, hidden, labels, 0, words)
        exponentials, normalizer = _normalizer(head, block, labels)
        d_logits = _d_logits(head, block, exponentials, normalizer, labels)
        d_params, d_hidden = _add_products(
            params, d_params, hidden, *d_logits, weights, 0
        )
        return d_params, d_hidden, _losses(head, normalizer)

    normalizer = _normalizer_over_words(head, params, hidden, labels, size)

    def add_word_chunk(carry, start, count):
        d_params, d_hidden = carry
        local = labels - start
        block = _block(head, params, hidden, local, start, count)
        exponentials = jnp.exp(block.logits - normalizer.shift[:, None])
        d_logits = _d_logits(head, block, exponentials, normalizer, local)
        d_params, d_chunk = _add_products(
            params, d_params, hidden, *d_logits, weights, start
        )
        return d_params, d_hidden + d_chunk

    zeros = (d_params, jnp.zeros_like(hidden, dtype=weights.dtype))
    d_params, d_hidden = over_words(add_word_chunk, zeros, words, size)
    return d_params, d_hidden, _losses(head, normalizer)


class Block(NamedTuple):
    """`(rows, words)` logits, and each row's logit at its label.

    `label_logit` is NaN where the label is not among the block's words. `slope` is the
    derivative of the soft cap at each logit, or None without a cap.
    """

    logits: Any
    slope: Any
    label_logit: Any


class Normalizer(NamedTuple):
    """Per row: the sum of `exp(logits - shift)`, the label's logit, the logits' sum.

    Shift and sum are kept apart: at logits of 1e5 their combined log, `log_sum_exp`,
    has lost the digits that tell a probability of 1/2 from one of 1/3. `logit_sum` is
    0 unless labels are smoothed.
    """

    shift: Any
    exp_sum: Any
    label_logit: Any
    logit_sum: Any

    @property
    def log_sum_exp(self):
        """The log of the softmax's denominator."""
        return jnp.log(self.exp_sum) + self.shift


def _block(head: Head, params: Params, hidden, labels, start, count: int) -> Block:
    """The logits of `count` words from `start`; `labels` count from `start` too."""
    params = {name: slice_columns(x, start, count) for name, x in params.items()}
    wide = at_least_float32(hidden.dtype)
    products = jnp.matmul(hidden, params["kernel"], preferred_element_type=wide)
    label_logit = _at_labels(products, labels).get(mode="fill", fill_value=0)
    bias = params.get("bias")
    if bias is not None:
        # Reading the labels' logits first lets the bias be added in place.
        products, label_logit = jax.lax.optimization_barrier((products, label_logit))
        label_logit = label_logit + bias.at[labels].get(mode="clip")
        products = products + bias[None, :]
    label_logit = _cap(head, label_logit)[0]
    # After the cap, whose derivative at NaN would be NaN.
    inside = (labels >= 0) & (labels < products.shape[1])
    return Block(*_cap(head, products), jnp.where(inside, label_logit, jnp.nan))


def _cap(head: Head, logits):
    """`(logits, slope)`: the soft cap and its derivative."""
    if head.logits_soft_cap is None:
        return logits, None
    bounded = jnp.tanh(logits / head.logits_soft_cap)
    return head.logits_soft_cap * bounded, 1 - bounded**2


def _normalizer(head: Head, block: Block, labels) -> tuple[Any, Normalizer]:
    """`(exponentials, normalizer)` of a block that has all words of this device."""
    shift = _finite(_largest_of_all(head, block.logits.max(-1)))
    exponentials = jnp.exp(block.logits - shift[:, None])
    exp_sum = exponentials.sum(-1)
    logit_sum = _add_logits(head, jnp.zeros_like(exp_sum), block)
    words = block.logits.shape[1]
    sums = _of_all_words(head, labels, words, exp_sum, block.label_logit, logit_sum)
    return exponentials, Normalizer(shift, *sums)


def _normalizer_over_words(head: Head, params, hidden, labels, size: int) -> Normalizer:
    """The normalizer from blocks of `size` words, with a running maximum."""
    words, wide = _words(params), at_least_float32(hidden.dtype)

    def add_word_chunk(carry, start, count):
        largest, exp_sum, label_logit, logit_sum = carry
        block = _block(head, params, hidden, labels - start, start, count)
        larger = jnp.maximum(largest, jax.lax.stop_gradient(block.logits.max(-1)))
        shift = _finite(larger)
        exp_sum *= jnp.exp(largest - shift)
        exp_sum += jnp.exp(block.logits - shift[:, None]).sum(-1)
        inside = (labels >= start) & (labels < start + count)
        label_logit = jnp.where(inside, block.label_logit, label_logit)
        return larger, exp_sum, label_logit, _add_logits(head, logit_sum, block)

    zeros = jnp.zeros_like(labels, dtype=wide)
    # A label outside the vocabulary leaves NaN.
    carry = (zeros - jnp.inf, zeros, zeros + jnp.nan, zeros)
    largest, exp_sum, *sums = over_words(add_word_chunk, carry, words, size)
    shift = _finite(_largest_of_all(head, largest))
    if head.word_axes:
        exp_sum *= jnp.exp(largest - shift)
    return Normalizer(shift, *_of_all_words(head, labels, words, exp_sum, *sums))


def _largest_of_all(head: Head, largest):
    """Each row's largest logit, of the words of all devices."""
    largest = jax.lax.stop_gradient(largest)
    return jax.lax.pmax(largest, head.word_axes) if head.word_axes else largest


def _of_all_words(head: Head, labels, words: int, exp_sum, label_logit, logit_sum):
    """The sums of a normalizer, over the words of all devices.

    Only one device has the label of a row among its `words` words.
    """
    if not head.word_axes:
        return exp_sum, label_logit, logit_sum
    label_logit = jnp.where((labels >= 0) & (labels < words), label_logit, 0)
    sums = jax.lax.psum(jnp.stack([exp_sum, label_logit]), head.word_axes)
    if head.label_smoothing:
        logit_sum = jax.lax.psum(logit_sum, head.word_axes)
    return *sums, logit_sum


def _finite(largest):
    """0 for minus infinity, the largest logit if the bias bans every word."""
    return jnp.where(jnp.isneginf(largest), 0, largest)


def _add_logits(head: Head, logit_sum, block: Block):
    """Adds the block's logits, which only label smoothing needs."""
    return logit_sum + block.logits.sum(-1) if head.label_smoothing else logit_sum


def _at_labels(x, labels):
    """`x.at[row, labels[row]]` for every row."""
    # Negative indices would count from the end.
    columns = jnp.where(labels < 0, x.shape[1], labels)
    return x.at[jnp.arange(x.shape[0]), columns]


def _losses(head: Head, normalizer: Normalizer):
    log_sum_exp = normalizer.log_sum_exp
    losses = log_sum_exp - (1 - head.label_smoothing) * normalizer.label_logit
    if head.label_smoothing:
        losses -= head.label_smoothing / head.words * normalizer.logit_sum
    return losses + head.z_loss * log_sum_exp**2 if head.z_loss else losses


def _d_logits(head: Head, block: Block, exponentials, normalizer, labels):
    """The losses' gradients by the logits, as `(d_logits, scale)`, a scale per row.

    Plain cross-entropy leaves the division by the sums to the scale, which later
    multiplies smaller arrays.
    """
    is_plain = not (head.label_smoothing or head.z_loss or head.logits_soft_cap)
    if is_plain and not head.is_half:
        at_labels = _at_labels(exponentials, labels)
        d_logits = at_labels.add(-normalizer.exp_sum, **ONE_PER_ROW)
        return d_logits, 1 / normalizer.exp_sum
    share = (1 + 2 * head.z_loss * normalizer.log_sum_exp) / normalizer.exp_sum
    d_logits = exponentials * share[:, None]
    d_logits -= head.label_smoothing / head.words
    at_labels = _at_labels(d_logits, labels)
    d_logits = at_labels.add(head.label_smoothing - 1, **ONE_PER_ROW)
    return d_logits if block.slope is None else d_logits * block.slope, 1.0


def _add_products(params: Params, d_params, hidden, d_logits, scale, weights, start):
    """`(d_params, d_hidden)` of one block, `d_params` added from column `start` on."""
    scale = (weights * scale)[:, None]
    product = functools.partial(jnp.matmul, preferred_element_type=d_logits.dtype)
    narrow = d_logits.astype(hidden.dtype)
    scaled = (hidden.astype(scale.dtype) * scale).astype(hidden.dtype)
    d_columns = {"kernel": product(narrow.T, scaled)}
    if "bias" in params:
        d_columns["bias"] = jnp.matmul(scale[:, 0], d_logits)
    add = functools.partial(add_at, start=start)
    d_params = jax.tree.map(add, d_params, d_columns)
    kernel = slice_columns(params["kernel"], start, d_logits.shape[1])
    return d_params, product(narrow, kernel.T) * scale


def _words(params: Params) -> int:
    return params["kernel"].shape[1]
