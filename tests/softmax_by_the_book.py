"""The softmax head's losses by the book: all logits at once, in plain JAX."""

import jax
import jax.numpy as jnp


def logits_of(params, hidden, logits_soft_cap=None, temperature=1.0):
    kernel = params["kernel"] if "kernel" in params else params["embedding"].T
    logits = hidden @ kernel + params.get("bias", 0)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    return logits / temperature


def valid_steps(labels, mask=None, weights=None, ignore_class=None):
    valid = jnp.ones(labels.shape, bool) if mask is None else mask
    if ignore_class is not None:
        valid &= labels != ignore_class
    return valid if weights is None else valid & (weights != 0)


def at(x, labels):
    return jnp.take_along_axis(x, labels[..., None], -1)[..., 0]


def cross_entropy(
    params, hidden, labels, *, mask=None, weights=None, class_weights=None,
    reduction="mean", label_smoothing=0.0, z_loss=0.0, logits_soft_cap=None,
    ignore_class=None,
):  # fmt: skip
    """`(loss, aux)`, the latter a tuple as `linear_cross_entropy` returns it."""
    valid = valid_steps(labels, mask, weights, ignore_class)
    labels = jnp.where(valid, labels, 0)
    logits = logits_of(params, jnp.where(valid[..., None], hidden, 0), logits_soft_cap)
    log_probs = jax.nn.log_softmax(logits)
    words = logits.shape[-1]
    by_class = jnp.ones(words) if class_weights is None else jnp.asarray(class_weights)
    of_labels = by_class[labels]
    plain = -of_labels * at(log_probs, labels)
    spread = -(by_class * log_probs).sum(-1) / words
    normalizers = jax.nn.logsumexp(logits, -1)
    losses = (1 - label_smoothing) * plain + label_smoothing * spread
    losses += z_loss * normalizers**2
    weights = jnp.ones(labels.shape) if weights is None else weights
    weights = jnp.where(valid, weights, 0)
    losses = jnp.where(valid, weights * losses, 0)
    total = (weights * of_labels).sum()
    mean = losses.sum() / jnp.where(total == 0, 1, total)
    predictions = logits.argmax(-1)
    aux = [at(log_probs, labels), normalizers, predictions, predictions == labels]
    aux = tuple(jnp.where(valid, x, 0) for x in (*aux, z_loss * normalizers**2))
    return {"mean": mean, "sum": losses.sum(), "none": losses}[reduction], aux


def log_probs_and_entropies(
    params, hidden, labels, *, mask=None, temperature=1.0, logits_soft_cap=None,
    ignore_class=None,
):  # fmt: skip
    valid = valid_steps(labels, mask, None, ignore_class)
    labels = jnp.where(valid, labels, 0)
    hidden = jnp.where(valid[..., None], hidden, 0)
    logits = logits_of(params, hidden, logits_soft_cap, temperature)
    log_probs = jax.nn.log_softmax(logits)
    entropies = -(jnp.exp(log_probs) * log_probs).sum(-1)
    return jnp.where(valid, at(log_probs, labels), 0), jnp.where(valid, entropies, 0)
