"""The loss of a step, from the statistics of its logits."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from tdjax._cross_entropy.logits import Statistics


class Terms(NamedTuple):
    """What the loss of a step is made of, beside its statistics.

    Attributes:
      label_weights: `(steps,)`, the class weights of the labels, or None.
      label_smoothing: `()`, or None.
      z_loss: `()`, or None.
    """

    label_weights: Any
    label_smoothing: Any
    z_loss: Any


def weighted_losses(weights, terms: Terms, statistics: Statistics):
    """The losses times the steps' weights."""
    # A masked step may have an infinite loss, where the bias bans its label.
    return weights * jnp.where(weights == 0, 0, losses_of(terms, statistics))


def losses_of(terms: Terms, statistics: Statistics):
    """The loss of each step.

    With logits z, label y, class weights c and log-sum-exp lse it is
    `(1 - label_smoothing) * c[y] * (lse - z[y]) + label_smoothing * mean(c * (lse - z))
    + z_loss * lse ** 2`.
    """
    losses = -statistics.log_probs
    if terms.label_weights is not None:
        # A word of weight 0 may be banned, with an infinite loss. NaN stays.
        weights = terms.label_weights
        is_nothing = (weights == 0) & jnp.isposinf(losses)
        losses = weights * jnp.where(is_nothing, 0, losses)
    normalizers = statistics.log_normalizers
    if terms.label_smoothing is not None:
        share, mean = terms.label_smoothing, statistics.mean_log_probs
        # A share of 0 of a banned word, whose log-probability is infinite, is 0.
        mean = jnp.where((share == 0) & jnp.isneginf(mean), 0, mean)
        losses = (1 - share) * losses - share * mean
    if terms.z_loss is not None:
        losses = losses + terms.z_loss * normalizers**2
    return losses
