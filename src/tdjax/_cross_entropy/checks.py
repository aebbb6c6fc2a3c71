"""What `linear_cross_entropy` accepts, and what it says about anything else."""

import contextlib
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from tdjax._checks import (
    NOT_STATIC,
    describe,
    is_array,
    is_concrete,
    require_array,
    require_sizes,
)
from tdjax._cross_entropy.sizes import Chunks
from tdjax._masks import require_mask_dtype

REDUCTIONS = ("mean", "sum", "none")


@contextlib.contextmanager
def forward_mode_refused(name: str):
    """Says what to use where JAX only says that `custom_vjp` has no forward mode."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{name} has no forward-mode derivative (jax.jvp, jax.jacfwd, "
            "jax.linearize). Use jax.grad, jax.vjp or jax.jacrev. Second derivatives "
            "work: jax.hessian, or jax.jvp of a gradient."
        ) from error


def check_steps(hidden: Any, labels: Any, mask: Any, words: int) -> None:
    require_array("labels", labels, 0, "(...)")
    one_hot = labels.shape == (*hidden.shape[:-1], words)
    hint = " For one-hot labels pass labels.argmax(-1)." if one_hot else ""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {describe(labels)}.{hint}")
    if labels.shape != hidden.shape[:-1]:
        if labels.shape == (*hidden.shape[:-1], 1):
            hint = " Pass labels[..., 0]."
        elif labels.ndim == 2 and labels.shape[::-1] == hidden.shape[:-1]:
            hint = " The labels look transposed: pass labels.T."
        raise ValueError(
            "labels must have the shape of hidden without its features, got "
            f"{describe(labels)} for hidden {describe(hidden)}.{hint}"
        )
    if mask is not None:
        require_mask_dtype(mask)
        if mask.shape != labels.shape:
            transposed = mask.ndim == 2 and mask.shape[::-1] == labels.shape
            hint = " The mask looks transposed: pass mask.T." if transposed else ""
            raise ValueError(
                "mask must have the shape of labels, got "
                f"{describe(mask)} for labels {describe(labels)}.{hint}"
            )


def check_reduction(reduction: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}.")


def check_weights(weights: Any, labels: Any) -> None:
    if weights is None:
        return
    require_array("weights", weights, 0, "(...)")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        hint = " Pass it as mask." if weights.dtype == jnp.bool_ else ""
        raise TypeError(f"weights must be of floats, got {describe(weights)}.{hint}")
    if weights.shape != labels.shape:
        fits = _broadcasts(weights.shape, labels.shape)
        hint = "For a weight of each word pass class_weights."
        if fits or weights.shape == labels.shape[: weights.ndim]:
            axes = "" if fits else "[..., None]"
            hint = f"Pass jnp.broadcast_to(weights{axes}, labels.shape)."
        raise ValueError(
            "weights must have the shape of labels, got "
            f"{describe(weights)} for labels {describe(labels)}. {hint}"
        )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def check_class_weights(class_weights: Any, words: int) -> None:
    if class_weights is None:
        return
    require_array("class_weights", class_weights, 1, "(words,)")
    if not jnp.issubdtype(class_weights.dtype, jnp.floating):
        raise TypeError(
            f"class_weights must be of floats, got {describe(class_weights)}."
        )
    if class_weights.shape != (words,):
        raise ValueError(
            f"class_weights must have shape (words,) = {(words,)}, got "
            f"{describe(class_weights)}. For a weight of each step pass weights."
        )


def require_scalar(name: str, value: Any, most: int | float = math.inf) -> Any:
    """A number, or a scalar that is only known at run time; None if it is 0.

    Refuses numbers below 0 and above `most`, or infinite.
    """
    _require_number(name, value, or_scalar=True)
    if not is_concrete(value) and is_array(value):
        return value
    value = float(value)
    if not 0 <= value <= most or value == math.inf:
        wanted = "0 or positive" if most == math.inf else f"from 0 to {most}"
        raise ValueError(f"{name} must be {wanted}, got {value}.")
    return value or None


def require_temperature(temperature: Any) -> Any:
    """A number, or a scalar that is only known at run time; None if it is 1."""
    _require_number("temperature", temperature, or_scalar=True)
    if not is_concrete(temperature) and is_array(temperature):
        return temperature
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive, got {float(temperature)}.")
    return None if float(temperature) == 1 else float(temperature)


def require_soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    _require_number("logits_soft_cap", cap)
    if not 0 < cap < math.inf:
        raise ValueError(f"logits_soft_cap must be positive, got {cap}.")
    return float(cap)


def require_class(ignore_class: Any) -> Any:
    is_int = isinstance(ignore_class, int | np.integer)
    if isinstance(ignore_class, bool) or not (ignore_class is None or is_int):
        raise TypeError(f"ignore_class must be an int, got {describe(ignore_class)}.")
    return ignore_class


def require_chunks(chunk_size: Any, vocab_chunk_size: Any, most_bytes: Any) -> Chunks:
    """The sizes of blocks that the user gave."""
    if isinstance(chunk_size, str):
        if chunk_size != "auto":
            raise ValueError(
                f"chunk_size must be an int or 'auto', got {chunk_size!r}."
            )
        chunk_size = None
    chunks = require_sizes(
        chunk_size=chunk_size, vocab_chunk_size=vocab_chunk_size,
        max_logits_bytes=most_bytes, optional=True,
    )  # fmt: skip
    if chunks[2] is not None and chunks[:2] != [None, None]:
        raise ValueError(
            f"max_logits_bytes={most_bytes} takes the place of chunk_size and "
            f"vocab_chunk_size, got chunk_size={chunk_size}, "
            f"vocab_chunk_size={vocab_chunk_size}. Give one or the other."
        )
    return Chunks(*chunks)


def require_capacity(
    capacity: Any, labels: Any, mask: Any, weights: Any, ignore_class: int | None
) -> tuple[int | None, int | None]:
    """`(capacity, valid steps)`, the second None where values can't be read."""
    (capacity,) = require_sizes(capacity=capacity, optional=True)
    if capacity is None:
        return None, None
    if all(x is None for x in (mask, weights, ignore_class)):
        raise ValueError(
            f"capacity={capacity} needs something that says which steps are valid: "
            "mask, weights or ignore_class."
        )
    needed = [mask, weights] if ignore_class is None else [labels, mask, weights]
    if not all(x is None or is_concrete(x) for x in needed):
        return capacity, None
    valid = np.ones(labels.shape, bool) if mask is None else np.array(mask)
    if weights is not None:
        valid &= np.asarray(weights) != 0
    if ignore_class is not None:
        valid &= np.asarray(labels) != ignore_class
    return capacity, int(valid.sum())


def check_capacity(capacity: int | None, count: int | None) -> None:
    """Refuses more valid steps than the capacity."""
    if capacity is not None and count is not None and count > capacity:
        raise ValueError(
            f"capacity={capacity} must be at least the number of valid steps, got "
            f"{count}."
        )


def check_axis_name(axis_name: Any, reduction: str) -> None:
    """Refuses what names no axes, and `axis_name` where it would do nothing."""
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            "axis_name must be the name of a mesh axis, or a tuple of names, got "
            f"{describe(axis_name)}."
        )
    if reduction == "none":
        raise ValueError(
            f"axis_name={axis_name!r} sums over devices, so it needs reduction='mean' "
            "or 'sum', got 'none'. Leave it out: each loss is that of one step."
        )


def _require_number(name: str, value: Any, or_scalar: bool = False) -> None:
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if is_number and not isinstance(value, bool):
        return
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", bool)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if or_scalar and shape == () and is_real:
        return
    wanted = "a number or a scalar array" if or_scalar else "a Python number"
    hint = f" {NOT_STATIC}" if not or_scalar and is_array(value) else ""
    raise TypeError(f"{name} must be {wanted}, got {describe(value)}.{hint}")


def check_labels(labels, mask, weights, ignore_class: int | None, words: int) -> None:
    """Refuses labels outside the vocabulary, where values can be read."""
    if not all(x is None or is_concrete(x) for x in (labels, mask, weights)):
        return
    labels = np.asarray(labels)
    wrong = (labels < 0) | (labels >= words)
    if mask is not None:
        wrong &= np.asarray(mask)
    if weights is not None:
        wrong &= np.asarray(weights) != 0
    if ignore_class is not None:
        wrong &= labels != ignore_class
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"labels must be from 0 to {words - 1}, the words of params, at "
            f"unmasked steps; got {labels[place]} at {place} ({int(wrong.sum())} of "
            f"{wrong.size} are out of range). Mask them, or give ignore_class."
        )
