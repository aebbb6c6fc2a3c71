"""A softmax over a large vocabulary and its gradient, a block of logits at a time.

In: a `Head` (options and block sizes), params `{"kernel": (features, words), "bias":
(words,)}`, hidden `(rows, features)` and labels `(rows,)`; a row is one step. Out: the
losses `(rows,)` or their weighted sum, differentiable by params and hidden. Rows go in
chunks, and so may the words: a block of logits is `(chunk_size, vocab_chunk_size)`,
and no more of them exist at once.

* `_losses_only`: the losses need only the log of a sum of exponentials. It is summed
  over the chunks of words with a running maximum (Milakov and Gimelshein 2018,
  https://arxiv.org/abs/1805.02867).
* `_losses_and_gradients`: the gradients of a weighted sum of losses are computed along
  with the losses, while the logits exist (Hsu et al. 2024,
  https://arxiv.org/abs/2410.10989). The backward pass only scales them. With words in
  chunks the logits are made twice, first for the log of the sum (Wijmans et al. 2024,
  https://arxiv.org/abs/2411.09009).

Names: `d_x` is the gradient of the loss by `x`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]
ONE_PER_ROW: dict[str, Any] = {
    "mode": "drop",
    "unique_indices": True,
    "indices_are_sorted": True,
}


class Head(NamedTuple):
    """The options of the loss of one step, and the sizes of the blocks.

    The loss of logits z and the label y is `lse(z) - (1 - label_smoothing) * z[y] -
    label_smoothing * mean(z) + z_loss * lse(z) ** 2`, where `lse` is the log of the sum
    of exponentials. The forward sizes are those of the losses without gradients.
    """

    label_smoothing: float
    z_loss: float
    logits_soft_cap: float | None
    chunk_size: int
    vocab_chunk_size: int
    forward_chunk_size: int
    forward_vocab_chunk_size: int
    is_half: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(head: Head, params: Params, hidden, labels, weights):
    """The sum of `weights * losses`; its gradients are made in the forward pass."""
    return _weighted_sum(weights, _losses_only(head, params, hidden, labels))


def _weighted_loss_forward(head, params, hidden, labels, weights):
    losses, gradients = _losses_and_gradients(head, params, hidden, labels, weights)
    like = jax.tree.map(_empty, (params, hidden))
    return _weighted_sum(weights, losses), (gradients, losses, like)


def _weighted_loss_backward(head, residuals, cotangent):
    gradients, losses, like = residuals
    scale = lambda gradient, x: (cotangent * gradient).astype(x.dtype)
    d_params, d_hidden = jax.tree.map(scale, gradients, like)
    return d_params, d_hidden, None, cotangent * losses


def _weighted_sum(weights, losses):
    # A step without weight may have an infinite loss, if a bias bans its label.
    return jnp.sum(jnp.where(weights == 0, 0, weights * losses))


def _empty(x):
    """An empty array that remembers a dtype."""
    return jnp.zeros((0,), x.dtype)


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses_per_step(head: Head, params: Params, hidden, labels):
    """The losses `(rows,)`; the backward pass makes the logits again."""
    return _losses_only(head, params, hidden, labels)


def _losses_forward(head, params, hidden, labels):
    return _losses_only(head, params, hidden, labels), (params, hidden, labels)


def _losses_backward(head, residuals, cotangents):
    params, hidden, labels = residuals
    _, gradients = _losses_and_gradients(head, params, hidden, labels, cotangents)
    cast = lambda gradient, x: gradient.astype(x.dtype)
    return *jax.tree.map(cast, gradients, (params, hidden)), None


losses_per_step.defvjp(_losses_forward, _losses_backward)


def _losses_only(head: Head, params: Params, hidden, labels):
    """The losses `(rows,)`, without gradients."""
    words, size = _words(params), head.forward_vocab_chunk_size

    def chunk_losses(rows):
        hidden, labels = rows
        return _losses(head, _normalizer(head, params, hidden, labels, size), words)

    rows = _in_chunks((hidden, labels), head.forward_chunk_size)
    chunked = jax.lax.map(chunk_losses, rows)
    return _join(chunked, labels.shape[0])


def _losses_and_gradients(head: Head, params: Params, hidden, labels, weights):
    """`(losses, (d_params, d_hidden))`, the gradients of the weighted sum of losses.

    Weights are scaled to at most 1 before they meet gradients in half precision, where
    the small weights of a mean over many steps would underflow. A float16 gradient
    stays in float32, so that loss scaling can still save its small values.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights), initial=0))
    largest = jnp.where(largest > 0, largest, 1)
    relative = weights / largest
    # Transposed, (words, features), so that a label is a row to add to.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x.T, dtype=weights.dtype), params)

    def add_chunk(d_params, rows):
        d_params, d_hidden, losses = _add_gradients(head, params, d_params, *rows)
        return d_params, (d_hidden, losses)

    rows = _in_chunks((hidden, labels, relative), head.chunk_size)
    # Under a second derivative too, no chunk's logits are kept.
    body = jax.checkpoint(add_chunk, prevent_cse=False)
    d_transposed, chunked = jax.lax.scan(body, zeros, rows)
    d_hidden, losses = (_join(chunks, labels.shape[0]) for chunks in chunked)

    def scale(gradient, x):
        small_range = x.dtype == jnp.float16
        return (largest * gradient).astype(gradient.dtype if small_range else x.dtype)

    d_params = jax.tree.map(lambda d, x: scale(d.T, x), d_transposed, params)
    return losses, (d_params, scale(d_hidden, hidden))


def _add_gradients(head: Head, params, d_params, hidden, labels, weights):
    """`(d_params, d_hidden, losses)` of a chunk of rows, added to `d_params`.

    `d_params` is transposed, as in `_losses_and_gradients`.
    """
    words, size = _words(params), head.vocab_chunk_size
    if size >= words:
        block = _block(head, params, hidden, labels, 0, words)
        exponentials, normalizer = _normalizer_of_block(head, block)
        d_logits = _d_logits(head, block, exponentials, normalizer, labels, words)
        d_params, d_hidden = _d_products(
            params, d_params, hidden, *d_logits, weights, 0
        )
        return d_params, d_hidden, _losses(head, normalizer, words)

    normalizer = _normalizer(head, params, hidden, labels, size)

    def add_words(carry, start, count):
        d_params, d_hidden = carry
        local = labels - start
        block = _block(head, params, hidden, local, start, count)
        exponentials = jnp.exp(block.logits - normalizer.shift[:, None])
        d_logits = _d_logits(head, block, exponentials, normalizer, local, words)
        d_params, part = _d_products(
            params, d_params, hidden, *d_logits, weights, start
        )
        return d_params, d_hidden + part

    start = (d_params, jnp.zeros(hidden.shape, weights.dtype))
    d_params, d_hidden = _over_words(add_words, start, words, size)
    return d_params, d_hidden, _losses(head, normalizer, words)


class Block(NamedTuple):
    """A block of logits.

    Attributes:
      logits: `(rows, words)`.
      slope: the derivative of the soft cap there, or None without one.
      label_logits: `(rows,)`, the logit of each row's label, NaN if it is elsewhere.
    """

    logits: Any
    slope: Any
    label_logits: Any


class Normalizer(NamedTuple):
    """What the loss needs to know of each row's logits, all `(rows,)`.

    The sum and its shift are kept apart: at logits of 1e5 the log of the sum alone has
    lost the digits that tell one half from one third.

    Attributes:
      shift: the largest logit.
      exponential_sum: the sum of `exp(logits - shift)`.
      label_logits: the label's logit.
      logit_sum: the sum of the logits, for label smoothing.
    """

    shift: Any
    exponential_sum: Any
    label_logits: Any
    logit_sum: Any

    @property
    def log(self):
        """The log of the sum of the logits' exponentials."""
        return jnp.log(self.exponential_sum) + self.shift


def _block(head: Head, params: Params, hidden, labels, start, count: int) -> Block:
    """The block of `count` words from `start`; `labels` count from `start` too."""
    params = {name: _slice(x, start, count) for name, x in params.items()}
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    products = jnp.matmul(hidden, params["kernel"], preferred_element_type=wide)
    label_logits = _at_labels(products, labels).get(mode="fill", fill_value=jnp.nan)
    bias = params.get("bias")
    if bias is None:
        return Block(*_cap(head, products), _cap(head, label_logits)[0])
    # After the labels' products are taken, XLA can add the bias in place.
    barrier = jax.lax.optimization_barrier
    products, label_logits = barrier((products, label_logits))
    label_logits = label_logits + bias.at[labels].get(mode="clip")
    return Block(*_cap(head, products + bias), _cap(head, label_logits)[0])


def _cap(head: Head, logits):
    """`(logits, slope)` after the soft cap."""
    if head.logits_soft_cap is None:
        return logits, None
    bounded = jnp.tanh(logits / head.logits_soft_cap)
    return head.logits_soft_cap * bounded, 1 - bounded**2


def _normalizer_of_block(head: Head, block: Block) -> tuple[Any, Normalizer]:
    """`(exponentials, normalizer)` of a block that has all words."""
    logits = block.logits
    shift = _finite(jax.lax.stop_gradient(logits.max(-1)))
    exponentials = jnp.exp(logits - shift[:, None])
    sums = exponentials.sum(-1)
    logit_sum = _add_sum(head, jnp.zeros_like(sums), block)
    return exponentials, Normalizer(shift, sums, block.label_logits, logit_sum)


def _normalizer(head: Head, params, hidden, labels, size: int) -> Normalizer:
    """The same, with the words in chunks of `size`."""
    words, rows = _words(params), hidden.shape[0]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def add_words(carry, start, count):
        largest, sums, label_logits, logit_sum = carry
        block = _block(head, params, hidden, labels - start, start, count)
        larger = jnp.maximum(largest, jax.lax.stop_gradient(block.logits.max(-1)))
        shift = _finite(larger)
        sums *= jnp.exp(largest - shift)
        sums += jnp.exp(block.logits - shift[:, None]).sum(-1)
        inside = (labels >= start) & (labels < start + count)
        label_logits = jnp.where(inside, block.label_logits, label_logits)
        return larger, sums, label_logits, _add_sum(head, logit_sum, block)

    zeros = jnp.zeros(rows, wide)
    # A label outside the vocabulary leaves NaN.
    carry = (zeros - jnp.inf, zeros, zeros + jnp.nan, zeros)
    largest, *rest = _over_words(add_words, carry, words, size)
    return Normalizer(_finite(largest), *rest)


def _finite(largest):
    """Zero in the place of minus infinity, where a bias bans every word."""
    return jnp.where(jnp.isneginf(largest), 0, largest)


def _add_sum(head: Head, logit_sum, block: Block):
    """Only label smoothing needs the sum of the logits."""
    return logit_sum + block.logits.sum(-1) if head.label_smoothing else logit_sum


def _at_labels(x, labels):
    # Negative indices would count from the end.
    inside = jnp.where(labels < 0, x.shape[1], labels)
    return x.at[jnp.arange(x.shape[0]), inside]


def _losses(head: Head, normalizer: Normalizer, words: int):
    losses = normalizer.log - (1 - head.label_smoothing) * normalizer.label_logits
    if head.label_smoothing:
        losses -= head.label_smoothing / words * normalizer.logit_sum
    return losses + head.z_loss * normalizer.log**2 if head.z_loss else losses


def _d_logits(head: Head, block: Block, exponentials, normalizer, labels, words):
    """`(d_logits, scale)`: the gradients by the logits are `scale[:, None] * d_logits`.

    Plain cross-entropy leaves the division by the sum to `scale`, a smaller array.
    """
    is_plain = not (head.label_smoothing or head.z_loss or head.logits_soft_cap)
    if is_plain and not head.is_half:
        sums = normalizer.exponential_sum
        d_logits = _at_labels(exponentials, labels).add(-sums, **ONE_PER_ROW)
        return d_logits, 1 / sums
    share = (1 + 2 * head.z_loss * normalizer.log) / normalizer.exponential_sum
    d_logits = exponentials * share[:, None]
    d_logits -= head.label_smoothing / words
    d_label = head.label_smoothing - 1
    d_logits = _at_labels(d_logits, labels).add(d_label, **ONE_PER_ROW)
    return d_logits if block.slope is None else d_logits * block.slope, 1.0


def _d_products(params: Params, d_params, hidden, d_logits, scale, weights, start):
    """`(d_params, d_hidden)` of a block, added to `d_params` at its words."""
    scale = (weights * scale)[:, None]
    product = functools.partial(jnp.matmul, preferred_element_type=d_logits.dtype)
    narrow = d_logits.astype(hidden.dtype)
    parts = {"kernel": product(narrow.T, (hidden * scale).astype(hidden.dtype))}
    if "bias" in params:
        parts["bias"] = jnp.matmul(scale[:, 0], d_logits)
    add = functools.partial(_add_at, start=start)
    d_params = jax.tree.map(add, d_params, parts)
    kernel = _slice(params["kernel"], start, d_logits.shape[1])
    return d_params, product(narrow, kernel.T) * scale


def _words(params: Params) -> int:
    return params["kernel"].shape[1]


def _over_words(body, carry, words: int, size: int):
    """Runs `carry = body(carry, start, count)` over the words in chunks."""
    whole = words // size
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, c: body(c, i * size, size), carry)
    rest = words - whole * size
    return body(carry, whole * size, rest) if rest else carry


def _slice(x, start, count: int):
    if count == x.shape[-1]:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=-1)


def _add_at(whole, part, start):
    if part.shape == whole.shape:
        return whole + part
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis=0)


def _in_chunks(rows, size: int):
    """(rows, ...) -> (chunks, size, ...), padded with zeros.

    A chunk has every n-th row, so that each device has a part of every chunk where
    rows are sharded over devices.
    """

    def chunk(x):
        chunks = -(-x.shape[0] // size)
        padding = [(0, chunks * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        x = jnp.reshape(jnp.pad(x, padding), (size, chunks, *x.shape[1:]))
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(chunk, rows)


def _join(chunked, rows: Any):
    rows_first = jnp.moveaxis(chunked, 0, 1)
    return jnp.reshape(rows_first, (-1, *chunked.shape[2:]))[:rows]
