"""The range of a result once its dtype has rounded it, or wrapped it around."""

import jax.numpy as jnp
import numpy as np

# Ranges are float64: of integers beyond this they keep no more than the magnitude.
EXACT_INTEGERS = 2.0**53


def rounded(dtype, low, high):
    """What `dtype` makes of values from `low` to `high`; NaN where that is not known.

    Rounding goes outwards, so the range holds whether or not the compiler rounds in
    between: XLA may fuse operations and keep the excess precision.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return _unless_it_wraps(dtype, low, high)
    if jnp.issubdtype(dtype, jnp.floating):
        return -_upwards(dtype, -low), _upwards(dtype, high)
    return low, high


def _unless_it_wraps(dtype, low, high):
    least = max(float(jnp.iinfo(dtype).min), -EXACT_INTEGERS)
    most = min(float(jnp.iinfo(dtype).max), EXACT_INTEGERS)
    fits = (low >= least) & (high <= most)
    return np.where(fits, low, np.nan), np.where(fits, high, np.nan)


def _upwards(dtype, value):
    """A value of `dtype` that is not below what becomes of this one."""
    info = jnp.finfo(dtype)
    # Twice the spacing also covers what exp and its like are off by.
    above = _nearest(dtype, value + 2 * float(info.eps) * abs(value))
    up = np.where(_is_exact(dtype, value), value, above)
    up = np.where(up > float(info.max), np.inf, up)
    # Subnormal numbers may be flushed to zero.
    tiny = float(info.tiny)
    return np.where(abs(up) < tiny, np.where(up > 0, tiny, 0.0), up)


def _is_exact(dtype, value):
    """In float64 a rounded result looks like an exact one, save for small integers."""
    if dtype == np.float64:
        return (np.trunc(value) == value) & (abs(value) < EXACT_INTEGERS)
    return _nearest(dtype, value) == value


def _nearest(dtype, value):
    return value.astype(dtype).astype(np.float64)


def extremes(dtype, bound: float) -> tuple[float, float]:
    """The range of an unknown value: a float stays within `bound`, integers anywhere.

    Complex numbers and random keys have no order, so no range.
    """
    if jnp.issubdtype(dtype, jnp.bool_):
        return 0.0, 1.0
    if jnp.issubdtype(dtype, jnp.integer):
        return float(jnp.iinfo(dtype).min), float(jnp.iinfo(dtype).max)
    if jnp.issubdtype(dtype, jnp.floating):
        return -bound, bound
    return np.nan, np.nan
