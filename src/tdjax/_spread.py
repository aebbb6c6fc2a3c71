"""Sets of arrays: what each element depends on, and the range it stays in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Spread(NamedTuple):
    """All the arrays a value can be as the input varies.

    `steps` is bool, `(in_steps, *shape)`: element e depends on input step j. `low` and
    `high` bound each element. An element with `low == high` is a constant and depends
    on nothing, whatever it was computed from: that is how a mask cuts a path.
    """

    steps: np.ndarray
    low: np.ndarray
    high: np.ndarray

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
        return Spread(self.steps[:, i], self.low[i], self.high[i])


def spread(steps, low, high, bound: float) -> Spread:
    """A `Spread` whose constants depend on nothing; undefined ranges become `bound`."""
    low, high = np.broadcast_arrays(low, high)
    undefined = np.isnan(low) | np.isnan(high)
    low, high = np.where(undefined, -bound, low), np.where(undefined, bound, high)
    return Spread(np.asarray(steps) & (low != high), low, high)


def within_bound(steps, bound: float) -> Spread:
    """Of unknown values within `bound`."""
    wide = np.full(steps.shape[1:], float(bound))
    return Spread(np.asarray(steps), -wide, wide)


def as_spread(value: Any, timesteps: int) -> Spread:
    """A known value depends on nothing."""
    if isinstance(value, Spread):
        return value
    value = _as_float(value)
    return Spread(np.zeros((timesteps, *value.shape), bool), value, value)


def as_spreads(values) -> list[Spread]:
    """All of them; at least one is a `Spread` and tells the number of steps."""
    timesteps = next(len(x.steps) for x in values if isinstance(x, Spread))
    return [as_spread(x, timesteps) for x in values]


def union(spreads: list[Spread]) -> Spread:
    """Any of several arrays of one shape."""
    return Spread(
        np.any([x.steps for x in spreads], axis=0),
        np.min([x.low for x in spreads], axis=0),
        np.max([x.high for x in spreads], axis=0),
    )


def stack(spreads: list[Spread]) -> Spread:
    """Along a new first axis, as a loop collects its results."""
    return Spread(
        np.stack([x.steps for x in spreads], axis=1),
        np.stack([x.low for x in spreads]),
        np.stack([x.high for x in spreads]),
    )


def _as_float(value) -> np.ndarray:
    """Random keys and complex numbers have no order; their range is undefined."""
    ordered = jax.dtypes.issubdtype(jnp.result_type(value), np.number)
    if jnp.result_type(value) == np.bool_ or (ordered and not jnp.iscomplexobj(value)):
        return np.asarray(value).astype(np.float64)
    return np.full(np.shape(value), np.nan)
