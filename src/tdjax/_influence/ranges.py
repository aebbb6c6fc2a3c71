"""Interval arithmetic for elementwise primitives (Moore 1966, "Interval Analysis").

A range is `(2, *shape)`: lower and upper ends, NaN where they are not known. Each
function takes the equation and the ranges of its operands.
"""

import math

import jax.numpy as jnp
import numpy as np

_increasing = lambda fun: lambda eqn, x: fun(x)


def _times(x, y):
    # Values are finite even where ranges are not, so zero times infinity is zero.
    return np.where((x == 0) | (y == 0), 0.0, x * y)


def _hull(candidates):
    candidates = np.stack(np.broadcast_arrays(*candidates))
    return np.min(candidates, axis=0), np.max(candidates, axis=0)


def _abs(eqn, x):
    holds_zero = (x[0] <= 0) & (x[1] >= 0)
    return np.where(holds_zero, 0.0, np.minimum(*np.abs(x))), np.maximum(*np.abs(x))


def _integer_pow(eqn, x):
    power = eqn.params["y"]
    if power < 0:
        return np.full_like(x, np.nan)
    return (np.stack(_abs(eqn, x)) if power % 2 == 0 else x) ** power


def _is_finite(eqn, x):
    """True but for infinite constants: what is computed from inputs stays finite."""
    infinite = (x[0] == x[1]) & np.isinf(x[0])
    either = (x[0] != x[1]) & np.isinf(x).any(axis=0)
    return np.where(infinite | either, 0.0, 1.0), np.where(infinite, 0.0, 1.0)


def _between(fun, least: float, most: float):
    """A function that is bounded, and whose turns are not followed."""

    def ranges(eqn, x):
        constant = x[0] == x[1]
        value = fun(x[0])
        return np.where(constant, value, least), np.where(constant, value, most)

    return ranges


def _exponential(fun):
    """A zero stays one, as masks need it; 1 may be the exponential of a tiny number."""

    def ranges(eqn, x):
        low, high = fun(x)
        rounded = (low == high) & (low != 0) & (x[0] != x[1])
        ends = np.nextafter(low, -np.inf), np.nextafter(high, np.inf)
        return np.where(rounded, ends[0], low), np.where(rounded, ends[1], high)

    return ranges


def _mul(eqn, x, y):
    return _hull([_times(a, b) for a in x for b in y])


def _div(eqn, x, y):
    low, high = _hull([_ratio(a, b) for a in x for b in y])
    away_from_zero = (y[0] > 0) | (y[1] < 0)
    if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer):
        return tuple(np.where(away_from_zero, np.trunc(z), np.nan) for z in (low, high))
    zero = (x[0] == 0) & (x[1] == 0)
    known = away_from_zero | zero
    return tuple(np.where(known, np.where(zero, 0.0, z), np.nan) for z in (low, high))


def _ratio(x, y):
    return np.where((x == 0) | np.isinf(y), 0.0, x / y)


# A comparison gives (certainly true, possibly true). Unknown ranges decide nothing.


_less = lambda eqn, x, y: (x[1] < y[0], ~(x[0] >= y[1]))
_less_equal = lambda eqn, x, y: (x[1] <= y[0], ~(x[0] > y[1]))


def _equal(eqn, x, y):
    always = (x[0] == x[1]) & (y[0] == y[1]) & (x[0] == y[0])
    return always, ~((x[0] > y[1]) | (y[0] > x[1]))


def _not_equal(eqn, x, y):
    always, ever = _equal(eqn, x, y)
    return ~ever, ~always


def _comparison(compare):
    return lambda eqn, x, y: tuple(
        np.asarray(z, np.float64) for z in compare(eqn, x, y)
    )


_swapped = lambda compare: lambda eqn, x, y: compare(eqn, y, x)


def _logical(fun):
    """Only for bools: the bits of integers are not followed."""

    def ranges(eqn, *operands):
        if eqn.outvars[0].aval.dtype == np.bool_:
            return fun(*operands)
        return np.full(np.broadcast_shapes(*(x.shape for x in operands)), np.nan)

    return ranges


def _convert(eqn, x):
    dtype = eqn.outvars[0].aval.dtype
    if dtype == np.bool_:
        surely = (x[0] > 0) | (x[1] < 0)
        return surely.astype(float), ((x[0] != 0) | (x[1] != 0)).astype(float)
    return np.trunc(x) if jnp.issubdtype(dtype, jnp.integer) else x


RANGES = {
    "add": lambda eqn, x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda eqn, x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _mul,
    "div": _div,
    "neg": lambda eqn, x: (-x[1], -x[0]),
    "max": lambda eqn, x, y: np.maximum(x, y),
    "min": lambda eqn, x, y: np.minimum(x, y),
    "clamp": lambda eqn, low, x, high: np.minimum(np.maximum(x, low), high),
    "lt": _comparison(_less),
    "le": _comparison(_less_equal),
    "gt": _comparison(_swapped(_less)),
    "ge": _comparison(_swapped(_less_equal)),
    "eq": _comparison(_equal),
    "ne": _comparison(_not_equal),
    "and": _logical(np.minimum),
    "or": _logical(np.maximum),
    "not": _logical(lambda x: (1 - x[1], 1 - x[0])),
    "convert_element_type": _convert,
    "abs": _abs,
    "square": lambda eqn, x: np.stack(_abs(eqn, x)) ** 2,
    "integer_pow": _integer_pow,
    "is_finite": _is_finite,
    "sign": _increasing(np.sign),
    "floor": _increasing(np.floor),
    "ceil": _increasing(np.ceil),
    "round": lambda eqn, x: (np.floor(x[0]), np.ceil(x[1])),
    "sin": _between(np.sin, -1.0, 1.0),
    "cos": _between(np.cos, -1.0, 1.0),
    "tanh": _increasing(np.tanh),
    "atan": _increasing(np.arctan),
    "asinh": _increasing(np.arcsinh),
    "sinh": _increasing(np.sinh),
    "cbrt": _increasing(np.cbrt),
    "log1p": _increasing(np.log1p),
    "expm1": _increasing(np.expm1),
    "erf": _increasing(np.vectorize(math.erf, otypes=[float])),
    "erfc": lambda eqn, x: np.vectorize(math.erfc, otypes=[float])(x[::-1]),
    "exp": _exponential(np.exp),
    "exp2": _exponential(np.exp2),
    "log": _increasing(np.log),
    "sqrt": _increasing(np.sqrt),
    "logistic": _increasing(lambda x: 1 / (1 + np.exp(-x))),
}

# A range that shrinks to one number under these has been rounded: the values may differ
# all the same, or may once XLA has written the computation in another way.
_ROUNDED = """
    add sub mul div square integer_pow sin cos atan asinh sinh cbrt log1p expm1 log sqrt
"""
ROUNDED = frozenset(_ROUNDED.split())


def outwards(low, high, operands):
    """The range with different ends, where operands vary and no factor is zero."""
    varies = np.any([x[0] != x[1] for x in operands], axis=0)
    is_zero = np.any([(x[0] == 0) & (x[1] == 0) for x in operands], axis=0)
    rounded = (low == high) & varies & ~((low == 0) & is_zero)
    return (
        np.where(rounded, np.nextafter(low, -np.inf), low),
        np.where(rounded, np.nextafter(high, np.inf), high),
    )
