"""Sets of arrays: what each element depends on, and the range it stays in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdjax._influence.rounding import EXACT_INTEGERS, extremes, rounded


class Spread(NamedTuple):
    """All the arrays a value can be as the input varies.

    `steps` is bool, `(in_steps, *shape)`: element e depends on input step j. `low` and
    `high` bound each element, NaN where nothing is known. An element with
    `low == high` is a constant and depends on nothing, whatever it was computed from:
    that is how a mask cuts a path. `far` marks the elements that a constant may have
    put beyond `bound`: what is computed from them is not taken to stay within it.
    """

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray
    far: np.ndarray

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
        return Spread(self.steps[:, i], self.low[i], self.high[i], self.far[i])


def spread(dtype, steps, low, high, far, bound: float) -> Spread:
    """A `Spread` as `dtype` rounds it. NaN ranges become the dtype's, unless far."""
    steps = np.asarray(steps)
    low, high, far = (np.broadcast_to(v, steps.shape[1:]) for v in (low, high, far))
    with np.errstate(all="ignore"):
        low, high = rounded(dtype, low, high)
    undefined = np.isnan(low) | np.isnan(high)
    least, most = extremes(dtype, bound)
    unbounded = far & jnp.issubdtype(dtype, jnp.floating)
    low = np.where(undefined, np.where(unbounded, np.nan, least), low)
    high = np.where(undefined, np.where(unbounded, np.nan, most), high)
    far = (far | (low > bound) | (high < -bound)) & ~((low >= -bound) & (high <= bound))
    return Spread(steps & (low != high), low, high, far)


def unknown(dtype, steps, far, bound: float) -> Spread:
    """Of values with no range of their own."""
    return spread(dtype, steps, np.nan, np.nan, far, bound)


def as_spread(value: Any, timesteps: int, bound: float) -> Spread:
    """A known value depends on nothing."""
    if isinstance(value, Spread):
        return value
    steps = np.zeros((timesteps, *np.shape(value)), bool)
    if jax.dtypes.issubdtype(jnp.result_type(value), jax.dtypes.extended):
        return unknown(jnp.result_type(value), steps, False, bound)
    number = np.asarray(value)
    number = number.astype(complex if np.iscomplexobj(number) else float)
    known = _ordered(number, jnp.issubdtype(jnp.result_type(value), jnp.integer))
    return Spread(steps, known, known, ~(abs(number) <= bound))


def _ordered(number, is_integer: bool) -> np.ndarray:
    """Complex numbers have no order, and large integers aren't exact as floats."""
    if np.iscomplexobj(number):
        return np.full(number.shape, np.nan)
    return np.where(is_integer & (abs(number) > EXACT_INTEGERS), np.nan, number)


def as_spreads(values, bound: float) -> list[Spread]:
    """All of them; at least one is a `Spread` and tells the number of steps."""
    timesteps = next(len(x.steps) for x in values if isinstance(x, Spread))
    return [as_spread(x, timesteps, bound) for x in values]


def union(spreads: list[Spread]) -> Spread:
    """Any of several arrays of one shape."""
    return Spread(
        np.any([x.steps for x in spreads], axis=0),
        np.min([x.low for x in spreads], axis=0),
        np.max([x.high for x in spreads], axis=0),
        np.any([x.far for x in spreads], axis=0),
    )


def stack(spreads: list[Spread]) -> Spread:
    """Along a new first axis, as a loop collects its results."""
    return Spread(
        np.stack([x.steps for x in spreads], axis=1),
        np.stack([x.low for x in spreads]),
        np.stack([x.high for x in spreads]),
        np.stack([x.far for x in spreads]),
    )


def everything(eqn, args, bound: float) -> list[Spread]:
    """Every output element depends on what any input element depends on."""
    args = as_spreads(args, bound)
    steps = np.any([x.any_steps for x in args], axis=0)
    far = any_far(args)
    outs = [v.aval for v in eqn.outvars]
    return [unknown(v.dtype, same_everywhere(steps, v.shape), far, bound) for v in outs]


def same_everywhere(steps, shape) -> np.ndarray:
    steps = steps.reshape(-1, *(1,) * len(shape))
    return np.broadcast_to(steps, (len(steps), *shape))


def any_far(spreads: list[Spread]) -> bool:
    return any(x.far.any() for x in spreads)
