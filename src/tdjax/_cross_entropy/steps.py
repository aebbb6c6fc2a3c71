"""The steps of one device: which are valid, flattened, packed, and put back.

In: `Inputs`, as users gave them, after the checks. `FlatSteps` has the same steps on
one axis, or with `capacity` only the valid ones; what is computed for them goes back to
the shape of labels by `unflatten`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tdjax._checks import at_least_float32, clipped_int32
from tdjax._cross_entropy.logits import Vocabulary
from tdjax._masks import over_trailing_axes

IGNORED = -2  # In place of `ignore_class`; -1 is a label outside the vocabulary.
_IN_ORDER: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}


class Inputs(NamedTuple):
    """The arrays of a call: of the vocabulary, of the steps, and for all devices."""

    params: dict[str, Any]
    class_weights: Any
    hidden: Any
    labels: Any
    mask: Any
    weights: Any
    scalars: dict[str, Any]


class FlatSteps(NamedTuple):
    """The steps that are computed, on one axis.

    Attributes:
      hidden: `(rows, features)`; 0 where a row is not valid, NaN where a label is
        outside the vocabulary.
      labels: `(rows,)`, 0 where a row is not valid.
      weights: `(rows,)`, 0 where a row is not valid, else 1 by default.
      valid: of the shape of labels, before.
      places: `(rows,)`, the places of packed rows, beyond all steps if there are fewer;
        None if all steps are computed.
      fits: `()`, whether no valid step is left out; None if that is known.
    """

    hidden: Any
    labels: Any
    weights: Any
    valid: Any
    places: Any
    fits: Any


def known_labels(labels, ignore_class: int | None, words: int):
    """Labels as int32, those outside the vocabulary as -1 or `words`, or `IGNORED`."""
    known = clipped_int32(labels, -1, words)
    info = jnp.iinfo(labels.dtype)
    # Labels can't have a value that their dtype can't hold.
    if ignore_class is None or not info.min <= ignore_class <= info.max:
        return known
    return jnp.where(labels == ignore_class, IGNORED, known)


def flatten(inputs: Inputs, words: int, capacity: int | None) -> FlatSteps:
    """The steps on one axis; neither NaN nor a gradient passes where one is masked."""
    hidden, labels, weights = inputs.hidden, inputs.labels, inputs.weights
    valid = labels != IGNORED
    if inputs.mask is not None:
        valid &= inputs.mask
    if weights is not None:
        valid &= weights != 0
    rows = jnp.ravel(valid)
    size = rows.shape[0]
    hidden = jnp.reshape(hidden, (size, hidden.shape[-1]))
    flat = [hidden, jnp.ravel(labels)]
    if weights is not None:
        flat.append(jnp.ravel(weights))
    places, fits = None, None
    if capacity is not None and not (isinstance(size, int) and size <= capacity):
        fits = jnp.sum(rows) <= capacity
        places = jnp.nonzero(rows, size=capacity, fill_value=size)[0]
        rows = places < size
        # Unused rows read zeros and write nothing: each has a place beyond the end.
        places = jnp.where(rows, places, size + jnp.arange(capacity))
        take = lambda x: x.at[places].get(mode="fill", fill_value=0, **_IN_ORDER)
        flat = [take(x) for x in flat]
    hidden, labels, *given = flat
    unknown = rows & ((labels < 0) | (labels >= words))
    hidden = jnp.where(over_trailing_axes(rows, 2), hidden, 0)
    # In this order, since `jax_debug_nans` stops at any NaN.
    hidden = jnp.where(over_trailing_axes(unknown, 2), jnp.nan, hidden)
    labels = jnp.where(rows, labels, 0)
    wide = at_least_float32(hidden.dtype)
    weights = rows.astype(wide)
    if given:
        weights = jnp.where(rows, given[0].astype(wide), 0)
    return FlatSteps(hidden, labels, weights, valid, places, fits)


def unflatten(steps: FlatSteps, x: Any) -> Any:
    """`(rows,)` in the shape of labels: 0 at masked steps, NaN beyond the capacity.

    Integers are the lowest of their dtype beyond the capacity, and bools False.
    """
    valid = steps.valid
    if steps.places is None:
        return jnp.where(valid, jnp.reshape(x, valid.shape), jnp.zeros((), x.dtype))
    flat = jnp.ravel(valid)
    rows = jnp.zeros(flat.shape, x.dtype)
    mark: Any = False
    if jnp.issubdtype(x.dtype, jnp.integer):
        mark = jnp.iinfo(x.dtype).min
    elif jnp.issubdtype(x.dtype, jnp.floating):
        # Times a result, the mark makes the gradient NaN as well.
        mark = jnp.where(steps.fits, 0, jnp.nan).astype(x.dtype) * x[0]
    beyond = flat & (jnp.cumsum(flat) > x.shape[0])
    rows = jnp.where(beyond, mark, rows)
    rows = rows.at[steps.places].set(x, mode="drop", **_IN_ORDER)
    return jnp.reshape(rows, valid.shape)


def nan_unless_all_fit(steps: FlatSteps, loss: Any) -> Any:
    """The loss of packed steps; NaN, and so its gradient, if some were left out."""
    return loss if steps.fits is None else loss * jnp.where(steps.fits, 1, jnp.nan)


def vocabulary_of(inputs: Inputs, wide: Any) -> Vocabulary:
    """The head's arrays; class weights and temperature have no gradient."""
    still = lambda x: None if x is None else jax.lax.stop_gradient(x).astype(wide)
    return Vocabulary(
        inputs.params, still(inputs.class_weights), jnp.ones((), wide),
        still(inputs.scalars["temperature"]),
    )  # fmt: skip


def weights_of_labels(class_weights, labels, word_axes: tuple[str, ...]) -> Any:
    """`(rows,)`: the class weight of each label, which one of the devices has."""
    inside = (labels >= 0) & (labels < class_weights.shape[0])
    found = class_weights.at[jnp.where(inside, labels, 0)].get(mode="clip")
    found = jnp.where(inside, found, 0)
    return jax.lax.psum(found, word_axes) if word_axes else found
