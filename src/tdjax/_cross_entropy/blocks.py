"""A softmax over a large vocabulary and its gradient, a block of logits at a time.

Steps are rows. Rows go in chunks, and so may the words: a block of logits is
`(chunk_size, vocab_chunk_size)`, and no more of them exist at once.

* Losses alone need the normaliser, a log of a sum of exponentials, which can be summed
  word chunk after word chunk with a running maximum (Milakov and Gimelshein 2018,
  https://arxiv.org/abs/1805.02867).
* Gradients of a weighted sum of losses are computed along with the losses, while the
  logits are there (Hsu et al. 2024, https://arxiv.org/abs/2410.10989): nothing is left
  for the backward pass but to scale them. With the words in chunks the logits are made
  twice, first for the normaliser (Wijmans et al. 2024,
  https://arxiv.org/abs/2411.09009).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]
ONE_A_ROW: dict[str, Any] = {
    "mode": "drop",
    "unique_indices": True,
    "indices_are_sorted": True,
}


class Head(NamedTuple):
    """What is computed: the loss of one step, and the sizes of the blocks.

    With logits z and the label y, `lse(z) - (1 - label_smoothing) * z[y] -
    label_smoothing * mean(z) + z_loss * lse(z) ** 2`, where `lse` is the log of the sum
    of exponentials.
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
    return _weighted_sum(weights, _forward(head, params, hidden, labels))


def _weighted_loss_forward(head, params, hidden, labels, weights):
    losses, gradients = _losses_and_gradients(head, params, hidden, labels, weights)
    like = jax.tree.map(_empty, (params, hidden))
    return _weighted_sum(weights, losses), (gradients, losses, like)


def _weighted_loss_backward(head, residuals, cotangent):
    gradients, losses, like = residuals
    scale = lambda gradient, x: (cotangent * gradient).astype(x.dtype)
    of_params, of_hidden = jax.tree.map(scale, gradients, like)
    return of_params, of_hidden, None, cotangent * losses


def _weighted_sum(weights, losses):
    # A step that does not count may have an infinite loss: its label may be banned.
    return jnp.sum(jnp.where(weights == 0, 0, weights * losses))


def _empty(x):
    """What remembers a dtype, and no more."""
    return jnp.zeros((0,), x.dtype)


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses_of_steps(head: Head, params: Params, hidden, labels):
    """The loss of every step; the backward pass makes the logits again."""
    return _forward(head, params, hidden, labels)


def _losses_forward(head, params, hidden, labels):
    return _forward(head, params, hidden, labels), (params, hidden, labels)


def _losses_backward(head, residuals, cotangents):
    params, hidden, labels = residuals
    _, gradients = _losses_and_gradients(head, params, hidden, labels, cotangents)
    cast = lambda gradient, x: gradient.astype(x.dtype)
    return *jax.tree.map(cast, gradients, (params, hidden)), None


losses_of_steps.defvjp(_losses_forward, _losses_backward)


def _forward(head: Head, params: Params, hidden, labels):
    """`(steps,)` losses without gradients."""
    words, size = _words(params), head.forward_vocab_chunk_size

    def of_rows(rows):
        hidden, labels = rows
        return _losses(head, _sums(head, params, hidden, labels, size), words)

    rows = _in_chunks((hidden, labels), head.forward_chunk_size)
    chunked = jax.lax.map(of_rows, rows)
    return _join(chunked, labels.shape[0])


def _losses_and_gradients(head: Head, params: Params, hidden, labels, weights):
    """Losses, and the gradients of their weighted sum by params and hidden.

    Weights are brought to at most 1 before they meet half-precision gradients of
    logits, where a mean over many steps would leave nothing of small probabilities. A
    float16 gradient is left wide, so that a scaled loss finds what it has to save.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights), initial=0))
    largest = jnp.where(largest > 0, largest, 1)
    relative = weights / largest
    # The kernel's gradient is (words, features) here: a label is a row to add to.
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x.T, dtype=weights.dtype), params)

    def of_rows(sums, rows):
        sums, of_hidden, losses = _add_gradients(head, params, sums, *rows)
        return sums, (of_hidden, losses)

    rows = _in_chunks((hidden, labels, relative), head.chunk_size)
    # Under a second derivative, keep no chunk's logits either.
    body = jax.checkpoint(of_rows, prevent_cse=False)
    sums, chunked = jax.lax.scan(body, zeros, rows)
    of_hidden, losses = (_join(each, labels.shape[0]) for each in chunked)

    def scale(gradient, x):
        small_range = x.dtype == jnp.float16
        return (largest * gradient).astype(gradient.dtype if small_range else x.dtype)

    of_params = jax.tree.map(lambda total, x: scale(total.T, x), sums, params)
    return losses, (of_params, scale(of_hidden, hidden))


def _add_gradients(head: Head, params, sums, hidden, labels, weights):
    """Adds what a chunk of rows gives to the gradients of params.

    Returns the sums, the gradient by the rows of `hidden`, and their losses.
    """
    words, size = _words(params), head.vocab_chunk_size
    if size >= words:
        block = _block(head, params, hidden, labels, 0, words)
        exponentials, found = _found(head, block)
        of_logits = _of_logits(head, block, exponentials, found, labels, words)
        sums, of_hidden = _products(params, sums, hidden, *of_logits, weights, 0)
        return sums, of_hidden, _losses(head, found, words)

    found = _sums(head, params, hidden, labels, size)

    def of_words(carry, start, count):
        sums, of_hidden = carry
        block = _block(head, params, hidden, labels - start, start, count)
        exponentials = jnp.exp(block.logits - found.shift[:, None])
        of_logits = _of_logits(head, block, exponentials, found, labels - start, words)
        sums, more = _products(params, sums, hidden, *of_logits, weights, start)
        return sums, of_hidden + more

    start = (sums, jnp.zeros(hidden.shape, weights.dtype))
    sums, of_hidden = _over_words(of_words, start, words, size)
    return sums, of_hidden, _losses(head, found, words)


class Block(NamedTuple):
    """`(rows, words)` logits, and the logit of each row's label, or NaN.

    `slope` is that of the logits by what the soft cap was applied to, or None.
    """

    logits: Any
    slope: Any
    picked: Any


class Found(NamedTuple):
    """Of each row: the sum of `exp(logits - shift)`, the label's logit, and their sum.

    Not the log of the sum alone: at logits of 1e5 it has lost the digits that tell one
    half from one third.
    """

    shift: Any
    sums: Any
    picked: Any
    total: Any

    @property
    def normaliser(self):
        """The log of the sum of the logits' exponentials."""
        return jnp.log(self.sums) + self.shift


def _block(head: Head, params: Params, hidden, labels, start, count: int) -> Block:
    """Of `count` words from `start`, from where `labels` count too."""
    params = {name: _slice(x, start, count) for name, x in params.items()}
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    products = jnp.matmul(hidden, params["kernel"], preferred_element_type=wide)
    picked = _at_labels(products, labels).get(mode="fill", fill_value=jnp.nan)
    bias = params.get("bias")
    if bias is None:
        return Block(*_cap(head, products), _cap(head, picked)[0])
    # Once the labels' products are taken, the bias can be added in place.
    products, picked = jax.lax.optimization_barrier((products, picked))
    picked = picked + bias.at[labels].get(mode="clip")
    return Block(*_cap(head, products + bias), _cap(head, picked)[0])


def _cap(head: Head, logits):
    """`(logits, slope)`."""
    if head.logits_soft_cap is None:
        return logits, None
    bounded = jnp.tanh(logits / head.logits_soft_cap)
    return head.logits_soft_cap * bounded, 1 - bounded**2


def _found(head: Head, block: Block) -> tuple[Any, Found]:
    """Of all words at once, with the exponentials."""
    logits = block.logits
    shift = _finite(jax.lax.stop_gradient(logits.max(-1)))
    exponentials = jnp.exp(logits - shift[:, None])
    sums = exponentials.sum(-1)
    total = _add_sum(head, jnp.zeros_like(sums), block)
    return exponentials, Found(shift, sums, block.picked, total)


def _sums(head: Head, params, hidden, labels, size: int) -> Found:
    """Likewise, with words in chunks of `size`."""
    words, rows = _words(params), hidden.shape[0]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_words(carry, start, count):
        largest, sums, picked, total = carry
        block = _block(head, params, hidden, labels - start, start, count)
        larger = jnp.maximum(largest, jax.lax.stop_gradient(block.logits.max(-1)))
        shift = _finite(larger)
        sums *= jnp.exp(largest - shift)
        sums += jnp.exp(block.logits - shift[:, None]).sum(-1)
        inside = (labels >= start) & (labels < start + count)
        picked = jnp.where(inside, block.picked, picked)
        return larger, sums, picked, _add_sum(head, total, block)

    zeros = jnp.zeros(rows, wide)
    # A label that is no word leaves NaN.
    carry = (zeros - jnp.inf, zeros, zeros + jnp.nan, zeros)
    largest, sums, picked, total = _over_words(of_words, carry, words, size)
    return Found(_finite(largest), sums, picked, total)


def _finite(largest):
    """A shift by minus infinity, where every word is banned by its bias, is none."""
    return jnp.where(jnp.isneginf(largest), 0, largest)


def _add_sum(head: Head, total, block: Block):
    return total + block.logits.sum(-1) if head.label_smoothing else total


def _at_labels(x, labels):
    # Negative indices would count from the end.
    inside = jnp.where(labels < 0, x.shape[1], labels)
    return x.at[jnp.arange(x.shape[0]), inside]


def _losses(head: Head, found: Found, words: int):
    losses = found.normaliser - (1 - head.label_smoothing) * found.picked
    if head.label_smoothing:
        losses -= head.label_smoothing / words * found.total
    return losses + head.z_loss * found.normaliser**2 if head.z_loss else losses


def _of_logits(head: Head, block: Block, of_logits, found: Found, labels, words):
    """The losses' gradients by the logits, as `(gradients, scale of each row)`.

    Plain cross-entropy leaves the division of the exponentials to smaller arrays.
    """
    is_plain = not (head.label_smoothing or head.z_loss or head.logits_soft_cap)
    if is_plain and not head.is_half:
        of_logits = _at_labels(of_logits, labels).add(-found.sums, **ONE_A_ROW)
        return of_logits, 1 / found.sums
    share = (1 + 2 * head.z_loss * found.normaliser) / found.sums
    of_logits *= share[:, None]
    of_logits -= head.label_smoothing / words
    of_label = head.label_smoothing - 1
    of_logits = _at_labels(of_logits, labels).add(of_label, **ONE_A_ROW)
    return of_logits if block.slope is None else of_logits * block.slope, 1.0


def _products(params: Params, sums, hidden, of_logits, scale, weights, start):
    """The gradients by a block's columns of params, added, and by hidden."""
    scale = (weights * scale)[:, None]
    product = functools.partial(jnp.matmul, preferred_element_type=of_logits.dtype)
    narrow = of_logits.astype(hidden.dtype)
    parts = {"kernel": product(narrow.T, (hidden * scale).astype(hidden.dtype))}
    if "bias" in params:
        parts["bias"] = jnp.matmul(scale[:, 0], of_logits)
    sums = jax.tree.map(functools.partial(_add_at, start=start), sums, parts)
    kernel = _slice(params["kernel"], start, of_logits.shape[1])
    return sums, product(narrow, kernel.T) * scale


def _words(params: Params) -> int:
    return params["kernel"].shape[1]


def _over_words(body, carry, words: int, size: int):
    """`body(carry, start, count)` over the vocabulary, the rest last."""
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

    A chunk has every n-th row: where rows are sharded over devices, each then has a
    part of every chunk.
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
