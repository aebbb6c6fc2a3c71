"""A `Spread` stands for all the arrays a value can be as the input varies.

It says for each element which input steps it depends on and the range it stays in.
Every operation may widen a range or add a dependence, and never the reverse.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Largest(NamedTuple):
    """Says that a value is at least the maximum of another along some axes.

    So a softmax, which subtracts the maximum, is known to have no positive exponents.
    """

    of: np.ndarray  # The `steps` of the other, by which it is known again.
    axes: tuple[int, ...]
    rows: np.ndarray  # For each element, the number of the maximum that it is.

    def bounds(self, x: "Spread") -> bool:
        """Whether each element is at least the one of `x` at the same place."""
        if self.of is not x.steps:
            return False
        reduced = [n for axis, n in enumerate(x.shape) if axis not in self.axes]
        rows = np.arange(int(np.prod(reduced))).reshape(reduced)
        rows = np.broadcast_to(np.expand_dims(rows, self.axes), x.shape)
        return np.array_equal(np.broadcast_to(self.rows, x.shape), rows)


class Spread(NamedTuple):
    """What is known of each element of a value.

    Attributes:
      steps: `(in_steps, *shape)`, bool: whether element e depends on input step j.
      low: `(*shape)`, float64, the lower end of each element's range.
      high: the upper end. If `low == high` the element is a constant and depends on
        nothing: this is how a mask cuts a path.
      sign_varies: whether it was computed from a zero that may be 0.0 or -0.0, which
        only matters to what reads a sign bit.
      largest: of what other value this holds the largest elements, if so.

    A float without a known range lies within `bound`, or anywhere if it was computed
    from a constant beyond `bound`. Complex numbers and random keys have no order, and
    NaN ends.
    """

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sign_varies: bool = False
    largest: "Largest | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low.shape

    @property
    def nonzero(self) -> np.ndarray:
        return (self.low != 0) | (self.high != 0)

    @property
    def flat_steps(self) -> np.ndarray:
        """(in_steps, elements)."""
        return self.steps.reshape(len(self.steps), self.low.size)

    @property
    def any_steps(self) -> np.ndarray:
        """(in_steps,): what any of the elements depends on."""
        return np.logical_or.reduce(self.flat_steps, axis=1)

    def take(self, i: int) -> "Spread":
        steps, low, high, sign_varies, _ = self
        return Spread(steps[:, i], low[i], high[i], sign_varies)

    def far(self, bound: float) -> Any:
        """Which elements may lie beyond the bound."""
        return (self.low < -bound) | (self.high > bound)


def spread(dtype, steps, low, high, far, bound: float) -> Spread:
    """Rounds the range as `dtype` does, and cuts it to the bound except where `far`."""
    steps = np.asarray(steps)
    low, high, far = (np.broadcast_to(v, steps.shape[1:]) for v in (low, high, far))
    with np.errstate(all="ignore"):
        low, high = _rounded(dtype, low, high)
    if jnp.issubdtype(dtype, jnp.floating):
        most = np.where(far, np.inf, bound)
        inside = (low != high) & (low < most) & (high > -most)
        low = np.where(inside | np.isnan(low), np.fmax(low, -most), low)
        high = np.where(inside | np.isnan(high), np.fmin(high, most), high)
    if dtype == np.bool_:
        low, high = np.nan_to_num(low, nan=0.0), np.nan_to_num(high, nan=1.0)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        low, high = np.nan_to_num(low, nan=info.min), np.nan_to_num(high, nan=info.max)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        low, high = np.where(far, -np.inf, np.nan), np.where(far, np.inf, np.nan)
    is_zero = (low == 0) & (high == 0)
    sign_varies = jnp.issubdtype(dtype, jnp.inexact) and bool((steps & is_zero).any())
    return Spread(steps & (low != high), low, high, sign_varies)


def _rounded(dtype, low, high):
    """The range after rounding to `dtype`; NaN where an integer may wrap around.

    Floats are rounded outwards, so that the range holds whether or not XLA fuses
    operations and keeps their excess precision.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        # Ranges are float64: from 2**53 on, an integer may have been rounded.
        info, exact = jnp.iinfo(dtype), 2.0**53 - 1
        fits = (low >= max(info.min, -exact)) & (high <= min(info.max, exact))
        return np.where(fits, low, np.nan), np.where(fits, high, np.nan)
    if jnp.issubdtype(dtype, jnp.floating):
        return -_upwards(dtype, -low), _upwards(dtype, high)
    return low, high


def _upwards(dtype, x):
    """At least what `x` becomes in `dtype`, exact, rounded or flushed to zero."""
    info = jnp.finfo(dtype)
    nearest = x.astype(dtype).astype(np.float64)
    exact = (nearest == x) & ((dtype != np.float64) | (np.trunc(x) == x))
    above = x + 3 * float(info.eps) * abs(x)
    above = np.where(above > float(info.max), np.inf, above)
    flushed = np.where(x > 0, float(info.tiny), 0.0)
    return np.where(abs(x) < float(info.tiny), flushed, np.where(exact, x, above))


def unknown(dtype, steps, far, bound: float) -> Spread:
    """A `Spread` whose range is not known."""
    return spread(dtype, steps, np.nan, np.nan, far, bound)


def as_spread(value: Any, timesteps: int, bound: float) -> Spread:
    """Makes a `Spread` of a known value, which depends on nothing."""
    if isinstance(value, Spread):
        return value
    dtype = jnp.result_type(value)
    steps = np.zeros((timesteps, *np.shape(value)), bool)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return unknown(dtype, steps, False, bound)
    number = np.asarray(value)
    number = number.astype(complex if np.iscomplexobj(number) else float)
    far = ~(abs(number) <= bound)
    if np.iscomplexobj(number):
        return unknown(dtype, steps, far, bound)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    known = np.where(is_integer & (abs(number) >= 2.0**53), np.nan, number)
    lost = np.isnan(known) & bool(jnp.issubdtype(dtype, jnp.floating))
    return Spread(steps, np.where(lost, -np.inf, known), np.where(lost, np.inf, known))


def as_spreads(values, bound: float) -> list[Spread]:
    """All values as spreads; at least one already is, and has the number of steps."""
    timesteps = next(len(x.steps) for x in values if isinstance(x, Spread))
    return [as_spread(x, timesteps, bound) for x in values]


def union(spreads: list[Spread]) -> Spread:
    """A value that may be any of several."""
    return Spread(
        np.any([x.steps for x in spreads], axis=0),
        np.min([x.low for x in spreads], axis=0),
        np.max([x.high for x in spreads], axis=0),
        any(x.sign_varies for x in spreads),
    )


def stack(spreads: list[Spread]) -> Spread:
    """Stacks on a new first axis, as a loop collects its results."""
    steps, low, high, sign_varies, _ = zip(*spreads)
    return Spread(
        np.stack(steps, axis=1), np.stack(low), np.stack(high), any(sign_varies)
    )


def everything(eqn, args, bound: float) -> list[Spread]:
    """Every output element depends on what any input element depends on.

    The sign of a zero may come from any step: which is not known.
    """
    args = as_spreads(args, bound)
    steps = np.any([x.any_steps for x in args], axis=0)
    steps = steps | any(x.sign_varies for x in args)
    far = any_far(args, bound)
    outs = [v.aval for v in eqn.outvars]
    return [unknown(v.dtype, same_everywhere(steps, v.shape), far, bound) for v in outs]


def same_everywhere(steps, shape) -> np.ndarray:
    """`(in_steps,)` repeated for every element of `shape`."""
    steps = steps.reshape(-1, *(1,) * len(shape))
    return np.broadcast_to(steps, (len(steps), *shape))


def any_far(spreads: list[Spread], bound: float) -> bool:
    return any(x.far(bound).any() for x in spreads)
