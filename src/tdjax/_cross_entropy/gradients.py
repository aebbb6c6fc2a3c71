"""The gradients of a softmax head, a block of logits at a time.

Of each row, the gradient by its logits is a sum of three: its probabilities, 1 at its
label, and the class weights, each times a number (`Slopes`). The numbers come from the
derivatives of the loss by the row's `Statistics`. Two products of that gradient then
give those by the kernel and by `hidden`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax._checks import at_least_float32
from tdjax._cross_entropy.chunks import add_at, in_chunks, join_chunks, over_words
from tdjax._cross_entropy.logits import (
    Block,
    Head,
    Statistics,
    Sums,
    Vocabulary,
    at_labels,
    block_of,
    finite_or_zero,
    slope_of_cap,
    sums_of_block,
    sums_over_words,
)
from tdjax._cross_entropy.losses import Terms, losses_of
from tdjax._cross_entropy.products import (
    AXIS_OF_WORDS,
    Params,
    in_both_layouts,
    is_half,
    times_transposed_kernel,
)
from tdjax._cross_entropy.slopes import (
    Slopes,
    largest_exponent,
    power_of_two,
    scaled,
    slopes_of,
)

ONE_PER_ROW: dict[str, Any] = {
    "mode": "drop",
    "unique_indices": True,
    "indices_are_sorted": True,
}


class Rows(NamedTuple):
    """`(rows, ...)` each: what is needed of some steps to compute gradients.

    Either the weights and the labels' class weights, of a weighted loss, or the sums of
    a forward pass and the cotangents of its statistics.
    """

    hidden: Any
    labels: Any
    weights: Any = None
    label_weights: Any = None
    sums: Any = None
    cotangents: Any = None


def gradients_of(
    head: Head, vocabulary: Vocabulary, rows: Rows, terms: Terms | None = None
) -> tuple[Any, Any]:
    """`((d_params, d_hidden), statistics)` of a weighted loss, or of cotangents.

    Float16 gradients stay float32 here, so that loss scaling can save small ones.
    """
    params, hidden, steps = vocabulary.params, rows.hidden, rows.labels.shape[0]
    is_whole, carried = head.block.words >= vocabulary.words, {}
    if is_half(params) and head.on_cpu and is_whole:
        carried = in_both_layouts(params)
    used = carried or params
    names = ["kernel" if "kernel" in used else "embedding", "bias"]
    wide = at_least_float32(hidden.dtype)
    zeros = {n: jnp.zeros_like(used[n], dtype=wide) for n in names if n in used}

    def add_chunk(carry, chunk):
        d_params, carried = carry
        rows, hidden_t = chunk
        words = vocabulary._replace(params=carried or params)
        d_params, *of_rows = _add_gradients(
            head, words, d_params, rows, hidden_t, terms
        )
        return (d_params, carried), of_rows

    chunks = in_chunks(rows, head.block.rows)
    hidden_t = jnp.swapaxes(chunks.hidden, 1, 2) if "kernel" in zeros else None
    # Under a second derivative, store no chunk's logits either.
    body = jax.checkpoint(add_chunk, prevent_cse=False)
    (d_params, _), of_rows = jax.lax.scan(body, (zeros, carried), (chunks, hidden_t))
    d_hidden, statistics = jax.tree.map(lambda x: join_chunks(x, steps), of_rows)
    if "embedding" in params and "kernel" in d_params:
        d_params["embedding"] = d_params.pop("kernel").T

    temperature = vocabulary.temperature

    def finish(gradient, x):
        gradient = gradient if temperature is None else gradient / temperature
        return gradient if x.dtype == jnp.float16 else gradient.astype(x.dtype)

    d_params = jax.tree.map(finish, d_params, params)
    return (d_params, finish(d_hidden, hidden)), statistics


def _add_gradients(head: Head, vocabulary: Vocabulary, d_params, rows: Rows, *others):
    """Of one chunk of rows, `(d_params, d_hidden, statistics)`.

    `d_params` is added to. `others` are the transpose of `hidden`, and the terms.
    """
    hidden, labels = rows.hidden, rows.labels
    hidden_t, terms = others
    words, size, sums = vocabulary.words, head.block.words, rows.sums
    if sums is not None:
        sums = _with_filling_rows(sums, rows.cotangents)

    def exponentials_of(block: Block, sums: Sums):
        return jnp.exp(block.logits - sums.shift[:, None])

    if size >= words:
        block = block_of(head, vocabulary, hidden, labels)
        if sums is None:
            exponentials, sums = sums_of_block(head, vocabulary, block)
        else:
            exponentials = exponentials_of(block, sums)
        slopes, statistics = _slopes(head, vocabulary, rows, terms, sums)
        scale, slopes = scaled(head, vocabulary, sums, slopes)
        steps = _scaled_steps(hidden, hidden_t, scale)
        d_logits = _d_logits(
            head, vocabulary, block, exponentials, sums, labels, slopes
        )
        product = _Product(*steps, scale, d_logits)
        return *product.added(head, vocabulary.params, d_params, 0), statistics

    if sums is None:
        sums = sums_over_words(head, vocabulary, hidden, labels, size)
    slopes, statistics = _slopes(head, vocabulary, rows, terms, sums)
    scale, slopes = scaled(head, vocabulary, sums, slopes)
    steps = _scaled_steps(hidden, hidden_t, scale)

    def add_word_chunk(carry, start, count):
        d_params, d_hidden = carry
        local, chunk = labels - start, vocabulary.take(start, count)
        block = block_of(head, chunk, hidden, local)
        exponentials = exponentials_of(block, sums)
        d_logits = _d_logits(head, chunk, block, exponentials, sums, local, slopes)
        product = _Product(*steps, scale, d_logits)
        d_params, d_chunk = product.added(head, chunk.params, d_params, start)
        return d_params, d_hidden + d_chunk

    zeros = (d_params, jnp.zeros_like(hidden, dtype=sums.shift.dtype))
    d_params, d_hidden = over_words(add_word_chunk, zeros, words, size)
    return d_params, d_hidden, statistics


def _slopes(
    head: Head, vocabulary: Vocabulary, rows: Rows, terms: Terms | None, sums: Sums
):
    """`(slopes, statistics)`; the latter only of a weighted loss."""
    statistics = sums.statistics(head, vocabulary)
    if terms is None:
        return slopes_of(head, vocabulary, rows.cotangents, statistics, sums), None
    terms = terms._replace(label_weights=rows.label_weights)
    smooth = statistics._replace(predictions=None)
    pullback = jax.vjp(functools.partial(losses_of, terms), smooth)[1]
    (cotangents,) = pullback(rows.weights)
    return slopes_of(head, vocabulary, cotangents, statistics, sums), statistics


def _with_filling_rows(sums: Sums, cotangents: Statistics) -> Sums:
    """Rows that only fill a chunk, in which all is 0, get exponentials of 0."""
    is_filling = sums.exp_sum == 0
    for cotangent in jax.tree.leaves(cotangents):
        is_filling &= cotangent == 0
    return sums._replace(
        shift=jnp.where(is_filling, jnp.inf, sums.shift),
        exp_sum=jnp.where(is_filling, 1, sums.exp_sum),
    )


def _d_logits(
    head: Head, vocabulary: Vocabulary, block: Block, exponentials, sums: Sums,
    labels, slopes: Slopes,
):  # fmt: skip
    """The gradient by the logits after the temperature, each row by its scale."""
    temperature, cap = vocabulary.temperature, head.logits_soft_cap
    if slopes.by_exp is None:
        return _added_at_labels(head, exponentials, labels, slopes.at_label)
    share = slopes.by_exp[:, None]
    if slopes.by_spread is not None:
        shifted = finite_or_zero(block.logits - sums.shift[:, None])
        share = share + slopes.by_spread[:, None] * shifted
    d_logits = exponentials * share
    if slopes.by_mean is not None:
        by_mean = slopes.by_mean[:, None]
        if vocabulary.class_weights is not None:
            by_mean = by_mean * vocabulary.class_weights[None, :]
        d_logits = d_logits + by_mean
    at_label = slopes.at_label
    if cap is not None:
        slope = functools.partial(slope_of_cap, head, temperature)
        d_logits = d_logits * slope(block.logits)
        outside = jnp.isnan(block.label_logit)
        at_label = at_label * slope(jnp.where(outside, 0, block.label_logit))
    return _added_at_labels(head, d_logits, labels, at_label)


def _added_at_labels(head: Head, d_logits, labels, at_label):
    """With a number added at each row's label, if that is among the words."""
    if head.on_cpu:
        return at_labels(d_logits, labels).add(at_label, **ONE_PER_ROW)
    # Elsewhere this becomes a part of the pass that computes `d_logits`.
    column = jnp.arange(d_logits.shape[1], dtype=labels.dtype)[None, :]
    return d_logits + jnp.where(column == labels[:, None], at_label[:, None], 0)


def _sum_of_rows(head: Head, d_logits, scale, is_half: bool):
    """`(words,)`: the sum over rows, each times its scale."""
    if scale is None:
        scale = jnp.ones(d_logits.shape[0], d_logits.dtype)
    if not is_half:
        return jnp.matmul(scale, d_logits)
    if not head.on_cpu:
        return (scale[:, None] * d_logits).sum(0)
    # Half-precision programs have no products of float32, and on a CPU XLA's own sum
    # takes as long as the products of the gradient.
    add = lambda total, row: (total + row[0] * row[1], None)
    return jax.lax.scan(add, jnp.zeros_like(d_logits[0]), (scale, d_logits))[0]


def _scaled_steps(hidden, hidden_t, scale) -> tuple[Any, Any, Any]:
    """`(hidden, hidden_t, factor)` of one chunk, each row times its scale.

    In half precision the largest are near 2**14 (float16 ends at 2**16), and products
    with them are to be multiplied by `factor`.
    """
    if scale is None:
        return hidden, hidden_t, None
    factor, wide = None, scale.dtype
    if jnp.finfo(hidden.dtype).bits < 32:
        largest = jnp.max(jnp.abs(hidden)).astype(wide)
        up = power_of_two(14 - largest_exponent(largest))
        factor = scale.max() / up
        scale = scale / factor
    times = lambda x, scale: (x.astype(wide) * scale).astype(x.dtype)
    hidden_t = None if hidden_t is None else times(hidden_t, scale[None, :])
    return times(hidden, scale[:, None]), hidden_t, factor


class _Product(NamedTuple):
    """The operands of the gradients of one block.

    Attributes:
      hidden, hidden_t, factor: of `_scaled_steps`; `hidden_t` is None if no kernel of
        shape (features, words) needs it.
      scale: of each row of `d_logits`, or None.
    """

    hidden: Any
    hidden_t: Any
    factor: Any
    scale: Any
    d_logits: Any

    def added(
        self, head: Head, params: Params, d_params: Params, start
    ) -> tuple[Params, Any]:
        """`(d_params, d_hidden)`, `d_params` added to from word `start` on."""
        d_logits, scale = self.d_logits, self.scale
        narrow, wide = d_logits.astype(self.hidden.dtype), d_logits.dtype
        product = functools.partial(jnp.matmul, preferred_element_type=wide)
        if "kernel" in d_params:
            name, d_kernel = "kernel", product(self.hidden_t, narrow)
        else:
            name, d_kernel = "embedding", product(narrow.T, self.hidden)
        d_words = {name: d_kernel if self.factor is None else self.factor * d_kernel}
        if "bias" in params:
            is_half = narrow.dtype != wide
            d_words["bias"] = _sum_of_rows(head, d_logits, scale, is_half)
        d_params = {
            name: add_at(x, d_words[name], start, AXIS_OF_WORDS[name])
            for name, x in d_params.items()
        }
        d_hidden = times_transposed_kernel(narrow, params, wide)
        return d_params, d_hidden if scale is None else d_hidden * scale[:, None]
