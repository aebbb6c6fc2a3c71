"""The coefficients of the gradient by the logits of a row, and their scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax._cross_entropy.logits import Head, Statistics, Sums, Vocabulary
from tdjax._cross_entropy.products import is_half


class Slopes(NamedTuple):
    """`(rows,)`: the coefficients of the gradient by the logits of a row.

    With probabilities p, label y, class weights c and logits z it is
    `p * (by_exp * exp_sum + by_spread * exp_sum * (z - shift)) + at_label * one_hot(y)
    + by_mean * c`.
    """

    by_exp: Any
    by_spread: Any
    at_label: Any
    by_mean: Any


def slopes_of(
    head: Head, vocabulary: Vocabulary, cotangents: Statistics, statistics, sums: Sums
) -> Slopes:
    """From the derivatives of the loss by the rows' statistics."""
    by_softmax = cotangents.log_normalizers - cotangents.log_probs
    by_spread = by_mean = None
    if "entropies" in head.wants:
        # The entropy's derivative is -p * (log p + entropy).
        of_entropy = jnp.log(sums.exp_sum) - statistics.entropies
        by_softmax += cotangents.entropies * of_entropy
        by_spread = -cotangents.entropies / sums.exp_sum
    if "mean_log_probs" in head.wants:
        by_softmax -= vocabulary.mean_weight * cotangents.mean_log_probs
        by_mean = cotangents.mean_log_probs / head.words
    by_exp = by_softmax / sums.exp_sum
    return Slopes(by_exp, by_spread, cotangents.log_probs, by_mean)


def scaled(
    head: Head, vocabulary: Vocabulary, sums: Sums, slopes: Slopes
) -> tuple[Any, Slopes]:
    """`(scale, slopes)`: the gradient by the logits of a row is its scale times that of
    the slopes. The scale is None where it is 1.
    """
    if is_half(vocabulary.params):
        return _scaled_to_float16(vocabulary, sums, slopes)
    if head.is_plain and head.on_cpu and head.logits_soft_cap is None:
        # The exponentials, less their sum at the label, are the gradient over
        # `by_exp`, which later multiplies smaller arrays.
        return slopes.by_exp, slopes._replace(by_exp=None, at_label=-sums.exp_sum)
    return None, slopes


def _scaled_to_float16(
    vocabulary: Vocabulary, sums: Sums, slopes: Slopes
) -> tuple[Any, Slopes]:
    """A power of two, which rounds nothing, for each row.

    It brings the gradient near 2**14, so that neither large nor tiny weights, nor the
    small probabilities beside them, leave the range of float16.
    """
    bound = jnp.abs(slopes.by_exp) * sums.exp_sum + jnp.abs(slopes.at_label)
    if slopes.by_spread is not None:
        # A probability p times its log is at most 0.4, and p is 1 at most.
        bound += jnp.abs(slopes.by_spread) * sums.exp_sum * (1 + jnp.log(sums.exp_sum))
    if slopes.by_mean is not None:
        largest = 1.0
        if vocabulary.class_weights is not None:
            largest = jnp.max(jnp.abs(vocabulary.class_weights))
        bound += jnp.abs(slopes.by_mean) * largest
    scale = power_of_two(largest_exponent(bound) - 14)
    return scale, jax.tree.map(lambda x: x / scale, slopes)


def largest_exponent(x):
    """The least n with `abs(x) < 2**n`, -48 for 0, and 0 for infinity and NaN.

    From -48 to 48, so that products and ratios of three such powers are float32.
    """
    x = jax.lax.stop_gradient(x)
    _, exponent = jnp.frexp(x)
    exponent = jnp.where(x == 0, -48, jnp.clip(exponent, -48, 48))
    return jnp.where(jnp.isfinite(x), exponent, 0)


def power_of_two(exponent):
    return jnp.ldexp(jnp.ones(exponent.shape, "float32"), exponent)
