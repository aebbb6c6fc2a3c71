"""Statistics and losses of a softmax head and their gradients, in blocks of logits.

In: the head's `Vocabulary`, `hidden` (steps, features) and `labels` (steps,), already
checked and flattened. Out: the `Statistics` of every step (`statistics_of_steps`), or
a weighted sum of losses (`weighted_loss`), each with a backward pass of its own.

Steps go in chunks of rows, and so may the words: only one block of logits, of the sizes
in `sizes`, exists at a time. For each chunk of rows:

1. `logits.block_of`: the logits of the block, with bias, soft cap and temperature.
2. `logits.sums_of_block`, `sums_over_words`: each row's sums of exponentials.
3. `gradients`: the gradients by the logits, and from them those by params, summed over
   all blocks, and by `hidden`.

`weighted_loss` does all of it in its forward pass, while the logits exist; its backward
pass only scales the gradients (Hsu et al. 2024, https://arxiv.org/abs/2410.10989). With
the words in chunks the logits are computed twice, for step 2 and again for step 3
(Wijmans et al. 2024, https://arxiv.org/abs/2411.09009). `statistics_of_steps` does not
know its cotangents before: its backward pass computes the logits once more, and takes
the sums of step 2 from the forward pass.

With the words split over devices, each runs this for its own words, and `labels` count
from its first. A device's gradients are partial sums, which the caller adds up.

On a CPU, XLA's products of bfloat16 are three times faster if neither operand has to be
transposed. So loops over half-precision params carry the kernel in both layouts there
(`in_both_layouts`), and all loops get `hidden` transposed once, for all chunks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tdjax._cross_entropy.chunks import in_chunks, join_chunks
from tdjax._cross_entropy.gradients import Rows, gradients_of
from tdjax._cross_entropy.logits import (
    Head,
    Statistics,
    Sums,
    Vocabulary,
    sums_over_words,
)
from tdjax._cross_entropy.losses import Terms, weighted_losses
from tdjax._cross_entropy.products import (
    in_both_layouts,
    is_half,
)

# The statistics of every step


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics_of_steps(head: Head, vocabulary: Vocabulary, hidden, labels):
    """`Statistics` of every step; the backward pass computes the logits again."""
    sums = _by_platform(_all_sums, head, vocabulary, hidden, labels)
    return sums.statistics(head, vocabulary)


def _statistics_forward(head, vocabulary, hidden, labels):
    sums = _by_platform(_all_sums, head, vocabulary, hidden, labels)
    return sums.statistics(head, vocabulary), (vocabulary, hidden, labels, sums)


def _statistics_backward(head, residuals, cotangents):
    vocabulary, hidden, labels, sums = residuals
    cotangents = _of_all_devices(head, cotangents._replace(predictions=None))
    rows = Rows(hidden, labels, sums=sums, cotangents=cotangents)
    gradients = _by_platform(gradients_of, head, vocabulary, rows)[0]
    like = vocabulary.params, hidden
    d_params, d_hidden = jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, like)
    return _cotangent(d_params), d_hidden, None


statistics_of_steps.defvjp(_statistics_forward, _statistics_backward)


# The weighted loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
    head: Head, vocabulary: Vocabulary, hidden, labels, weights, terms: Terms
):
    """`(sum of weights * losses, statistics)`; the forward pass has the gradients.

    Only the first result has gradients.
    """
    sums = _by_platform(_all_sums, head, vocabulary, hidden, labels)
    statistics = sums.statistics(head, vocabulary)
    return _weighted_sum(weights, terms, statistics), statistics


def _weighted_loss_forward(head, vocabulary, hidden, labels, weights, terms):
    rows = Rows(hidden, labels, weights, terms.label_weights)
    gradients, statistics = _by_platform(gradients_of, head, vocabulary, rows, terms)
    like = jax.tree.map(_empty, (vocabulary.params, hidden))
    loss = _weighted_sum(weights, terms, statistics)
    return (loss, statistics), (gradients, weights, terms, statistics, like)


def _weighted_loss_backward(head, residuals, cotangents):
    gradients, weights, terms, statistics, like = residuals
    cotangent = cotangents[0]
    total = _of_all_devices(head, cotangent)

    def scale(gradient, x):
        return (total * gradient.astype(total.dtype)).astype(x.dtype)

    d_params, d_hidden = jax.tree.map(scale, gradients, like)
    of_steps = functools.partial(_weighted_sum, statistics=statistics)
    d_weights, d_terms = jax.vjp(of_steps, weights, terms)[1](cotangent)
    return _cotangent(d_params), d_hidden, None, d_weights, d_terms


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _weighted_sum(weights, terms: Terms, statistics: Statistics):
    return jnp.sum(weighted_losses(weights, terms, statistics))


def _cotangent(d_params) -> Vocabulary:
    """Only the params have a gradient."""
    return Vocabulary(d_params, class_weights=None, mean_weight=None, temperature=None)


def _of_all_devices(head: Head, cotangents):
    """Of losses that the devices along `word_axes` share, each has a part of it."""
    return jax.lax.psum(cotangents, head.word_axes) if head.word_axes else cotangents


def _empty(x):
    """An empty array that only records the dtype of `x`."""
    return jnp.zeros((0,), x.dtype)


def _by_platform(run: Callable, head: Head, *arrays):
    """`run(head, *arrays)` for the platform that is compiled for."""
    on_cpu = functools.partial(run, head)
    elsewhere = functools.partial(run, head._replace(on_cpu=False))
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


# Without gradients


def _all_sums(head: Head, vocabulary: Vocabulary, hidden, labels) -> Sums:
    """The sums of every step."""
    sizes = head.block

    def of_chunk(carry, rows):
        (hidden, labels), size = rows, sizes.forward_words
        chunk = vocabulary._replace(params=carry or vocabulary.params)
        return carry, sums_over_words(head, chunk, hidden, labels, size)

    params, carried = vocabulary.params, {}
    if head.on_cpu and "embedding" in params and is_half(params):
        carried = in_both_layouts(params)
    chunks = in_chunks((hidden, labels), sizes.forward_rows)
    # Under a second derivative, store no chunk's logits.
    body = jax.checkpoint(of_chunk, prevent_cse=False)
    _, sums = jax.lax.scan(body, carried, chunks)
    return jax.tree.map(lambda x: join_chunks(x, labels.shape[0]), sums)
