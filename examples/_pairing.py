"""Logits with labels of their shape, and what a loss makes of labels of another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Shape = tuple[int, ...]

# Shapes of logits and labels that do not belong together, and what a loss that takes
# them makes of them: the labels of the other model, labels with an axis too many, and a
# batch of as many examples as steps.
MISMATCHES: dict[tuple[Shape, Shape], str] = {
    ((32, 8, 10), (32,)): "",
    ((32, 10), (32, 8)): "",
    ((32, 8, 10), (32, 1)): "an example's label goes to all of its steps",
    ((32, 10), (32, 1)): "every label meets every example",
    ((8, 8, 10), (8,)): "the label of example i goes to step i of all",
}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each label: `(..., classes)` logits with `(...)` labels.

    Raises:
      ValueError: if the shapes do not belong together.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {logits.shape[:-1]} to go with logits of shape "
            f"{logits.shape}, got {labels.shape}. Logits (batch, classes), of a "
            "many-to-one model, want labels (batch,); logits (batch, time, classes), "
            "of a many-to-many model, want labels (batch, time)."
        )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def one_hot_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The same of labels as one-hot vectors, with no look at the shapes."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, one_hot)


def mismatches() -> dict[str, dict[str, str]]:
    """What the losses of Optax make of each mismatch, as rows of a table."""
    integers = optax.softmax_cross_entropy_with_integer_labels
    return {
        f"{logits}, {labels}": {
            "integer loss": outcome(integers, logits, labels),
            "one-hot loss": outcome(one_hot_cross_entropy, logits, labels),
            "if it is taken": meaning,
        }
        for (logits, labels), meaning in MISMATCHES.items()
    }


def outcome(loss: Callable, logits: Shape, labels: Shape) -> str:
    """The shape of the losses, or the kind of error."""
    try:
        return str(_evaluate(loss, logits, labels).shape)
    except (TypeError, ValueError) as error:
        return type(error).__name__


def refusal(logits: Shape, labels: Shape) -> str:
    """The words with which `cross_entropy` refuses a mismatch."""
    try:
        _evaluate(cross_entropy, logits, labels)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{logits} and {labels} belong together")


def _evaluate(loss: Callable, logits: Shape, labels: Shape) -> jax.ShapeDtypeStruct:
    floats = jax.ShapeDtypeStruct(logits, jnp.float32)
    return jax.eval_shape(loss, floats, jax.ShapeDtypeStruct(labels, jnp.int32))
