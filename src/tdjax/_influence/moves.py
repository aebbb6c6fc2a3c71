"""Rules for primitives that move elements without computing with them.

They run on the numbers of the elements instead of the elements. The result says where
each output element came from, so any primitive of this kind needs no rule of its own.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax._influence.spread import (
    Spread,
    any_far,
    as_spreads,
    everything,
    same_everywhere,
    spread,
    unknown,
)


def move(data: tuple[int, ...] | None, bind: Callable[..., Any], eqn, args, bound):
    """Each output element is an element of the operands `data`, at a known place.

    The primitive is run on the elements' numbers to find out which.
    """
    data = tuple(range(len(args))) if data is None else data
    if any(isinstance(x, Spread) for i, x in enumerate(args) if i not in data):
        return everything(eqn, args, bound)
    spreads = as_spreads([args[i] for i in data], bound)
    numbered = dict(enumerate(args)) | dict(zip(data, _numbers(spreads)))
    outs = bind(eqn, *numbered.values())
    elements = Spread(
        np.concatenate([x.flat_steps for x in spreads], axis=1),
        np.concatenate([x.low.ravel() for x in spreads]),
        np.concatenate([x.high.ravel() for x in spreads]),
    )
    outs = [np.asarray(x) for x in (outs if isinstance(outs, list | tuple) else [outs])]
    picked = [_pick(eqn, elements, places, bound) for places in outs]
    largest = spreads[0].largest
    if largest is None or len(spreads) > 1 or any((x < 0).any() for x in outs):
        return picked
    rows = [largest.rows.ravel()[places] for places in outs]
    return [x._replace(largest=largest._replace(rows=r)) for x, r in zip(picked, rows)]


def _numbers(spreads: list[Spread]) -> list[Any]:
    """Consecutive numbers for the elements of several arrays."""
    starts = np.cumsum([0, *(x.low.size for x in spreads)])
    ranges = [np.arange(*pair, dtype=np.int32) for pair in pairwise(starts)]
    return [jnp.asarray(r.reshape(x.shape)) for r, x in zip(ranges, spreads)]


def _pick(eqn, elements: Spread, places, bound: float) -> Spread:
    """The elements at `places`; a negative place means a fill value."""
    outside = places < 0
    fill = _fill_value(eqn) if outside.any() else 0.0
    least, most = (-np.inf, np.inf) if np.isnan(fill) else (fill, fill)
    return Spread(
        elements.steps[:, places] & ~outside,
        np.where(outside, least, elements.low[places]),
        np.where(outside, most, elements.high[places]),
    )


def _fill_value(eqn) -> float:
    """What `jax.lax.gather` gives where an index is out of range."""
    fill, dtype = eqn.params["fill_value"], eqn.outvars[0].aval.dtype
    if fill is not None and not np.iscomplexobj(fill):
        return float(fill)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return float(jnp.iinfo(dtype).max)
    if jnp.issubdtype(dtype, jnp.integer):
        return float(jnp.iinfo(dtype).min)
    return 1.0 if dtype == np.bool_ else np.nan


def bind_same(eqn, *args):
    return eqn.primitive.bind(*args, **eqn.params)


def gather(eqn, args, bound: float) -> list[Spread]:
    operand, indices = args
    if not isinstance(indices, Spread):
        filled = {**eqn.params, "fill_value": -1}
        bind = lambda eqn, *args: eqn.primitive.bind(*args, **filled)
        return move((0,), bind, eqn, args, bound)
    # Unknown indices: a row depends on its index and on the whole operand.
    operand, _ = as_spreads(args, bound)
    out = eqn.outvars[0].aval
    offsets = eqn.params["dimension_numbers"].offset_dims
    steps = np.expand_dims(indices.steps.any(axis=-1), [axis + 1 for axis in offsets])
    steps = steps | same_everywhere(operand.any_steps, out.shape)
    return [spread(out.dtype, steps, *_any_row(eqn, operand), True, bound)]


def _any_row(eqn, operand: Spread):
    """The range of all elements and of the fill value; NaN has no range."""
    ends = [*operand.low.ravel(), *operand.high.ravel()]
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = _fill_value(eqn)
        ends += [] if np.isnan(fill) else [fill]
    return (np.min(ends), np.max(ends)) if ends else (np.nan, np.nan)


def scatter(eqn, args, bound: float) -> list[Spread]:
    """`x.at[...].set` moves elements; `x.at[...].apply` computes with them."""
    if eqn.params["update_jaxpr"] is not None:
        return everything(eqn, args, bound)
    overwrite = lambda eqn, *args: _scatter(lax.scatter, eqn, *args)
    return move((0, 2), overwrite, eqn, args, bound)


def _scatter(scatter, eqn, operand, indices, updates):
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}
    return scatter(operand, indices, updates, **options)


def scatter_add(eqn, args, bound: float) -> list[Spread]:
    if isinstance(args[1], Spread):
        return everything(eqn, args, bound)
    operand, _, updates = spreads = as_spreads(args, bound)
    add = lambda x, y: _scatter(lax.scatter_add, eqn, x, args[1], y)
    steps = jax.vmap(add)(
        jnp.asarray(operand.steps, jnp.float32), jnp.asarray(updates.steps, jnp.float32)
    )
    dtype, far = eqn.outvars[0].aval.dtype, any_far([spreads[0], spreads[2]], bound)
    return [unknown(dtype, np.asarray(steps) > 0, far, bound)]
