"""The loss of a step, from the statistics of its logits."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from tdjax._cross_entropy.logits import Statistics


class Terms(NamedTuple):
    """What the loss of a step is made of, beside its statistics.

    Attributes:
      label_weights: `(steps,)`, the class weights of the labels, or None.
      mean_class_weight: `()`.
      label_smoothing: `()`, or None.
      z_loss: `()`, or None.
    """

    label_weights: Any
    mean_class_weight: Any
    label_smoothing: Any
    z_loss: Any


def losses_of(terms: Terms, statistics: Statistics):
    """The loss of each step.

    With logits z, label y, class weights c and log-sum-exp lse it is
    `(1 - label_smoothing) * c[y] * (lse - z[y]) + label_smoothing * mean(c * (lse - z))
    + z_loss * lse ** 2`.
    """
    losses = -statistics.log_probs
    if terms.label_weights is not None:
        # A word of weight 0 may be banned, with an infinite loss.
        weights = terms.label_weights
        losses = jnp.where(weights == 0, 0, weights * losses)
    normalizers = statistics.log_normalizers
    if terms.label_smoothing is not None:
        spread = terms.mean_class_weight * normalizers - statistics.logit_means
        share = terms.label_smoothing
        losses = (1 - share) * losses + share * spread
    if terms.z_loss is not None:
        losses = losses + terms.z_loss * normalizers**2
    return losses
