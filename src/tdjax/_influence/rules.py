"""Rules: how each primitive passes dependence and range from operands to results.

A rule is `rule(eqn, args, bound) -> spreads`, one for each result. At least one of
`args` is a `Spread`; the others may be known arrays. A rule may say that an element
depends on too many steps, or give too wide a range, and never the reverse.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax._influence.moves import bind_same, gather, move, scatter, scatter_add
from tdjax._influence.ranges import RANGES, ROUNDED, outwards
from tdjax._influence.spread import (
    Largest,
    Spread,
    any_far,
    as_spreads,
    everything,
    spread,
    unknown,
)
from tdjax._jaxprs import ELEMENTWISE, IDENTITIES

# These map a mask's huge constants to small values: where their range says so.
_NEARING = frozenset(("exp", "exp2", "logistic", "tanh", "erf", "erfc", "sign"))


def _identity(eqn, args, bound: float):
    return args


def _elementwise(eqn, args, bound: float) -> list[Spread]:
    """An output element depends on the operands' elements at the same place."""
    args = as_spreads(args, bound)
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    steps = np.any([_align(x.steps, out.shape) for x in args], axis=0)
    low, high = np.nan, np.nan
    far = np.any([np.broadcast_to(x.far(bound), out.shape) for x in args], axis=0)
    if name in RANGES:
        with np.errstate(all="ignore"):
            ranges = [_range(x, out.shape) for x in args]
            low, high = RANGES[name](eqn, *ranges)
            if name in ROUNDED and jnp.issubdtype(out.dtype, jnp.inexact):
                low, high = outwards(low, high, ranges)
    if name in _NEARING:
        far = far & ((low < -bound) | (high > bound))
    if name == "sub" and args[1].largest and args[1].largest.bounds(args[0]):
        high = np.minimum(high, 0.0)
    result = spread(out.dtype, steps, low, high, far, bound)
    tops = [x.largest for x in args if x.largest and x.shape == out.shape]
    # The larger of a maximum and anything else is at least the maximum.
    return [result._replace(largest=tops[0]) if name == "max" and tops else result]


def _range(x: Spread, shape) -> np.ndarray:
    return np.stack([np.broadcast_to(end, shape) for end in (x.low, x.high)])


def _align(steps, shape):
    """A scalar operand goes with every element."""
    steps = steps.reshape(
        len(steps), *((1,) * (len(shape) + 1 - steps.ndim)), *steps.shape[1:]
    )
    return np.broadcast_to(steps, (len(steps), *shape))


def _select(eqn, args, bound: float) -> list[Spread]:
    """Where the choice is a constant, only the chosen case counts."""
    which, *cases = as_spreads(args, bound)
    out = eqn.outvars[0].aval
    low, high = _range(which, out.shape)
    taken = [~(low > i) & ~(high < i) for i in range(len(cases))]
    if sum(bool(on.any()) for on in taken) == 1:
        return [next(x for x, on in zip(cases, taken) if on.any())]
    steps = np.any([x.steps & on for x, on in zip(cases, taken)], axis=0)
    steps = steps | (_align(which.steps, out.shape) & (low != high))
    lows = [np.where(on, x.low, np.inf) for x, on in zip(cases, taken)]
    highs = [np.where(on, x.high, -np.inf) for x, on in zip(cases, taken)]
    ends = np.min(lows, axis=0), np.max(highs, axis=0)
    return [spread(out.dtype, steps, *ends, True, bound)]


def _bilinear(eqn, args, bound: float) -> list[Spread]:
    """A product counts if one factor depends on the step and the other isn't zero."""
    x, y = as_spreads(args, bound)
    out = eqn.outvars[0].aval
    params = {**eqn.params, "preferred_element_type": np.dtype(np.float32)}
    apply = functools.partial(eqn.primitive.bind, **params)
    steps = np.zeros((len(x.steps), *out.shape), bool)
    if x.steps.any():
        paths = jax.vmap(apply, (0, None))(_as_number(x.steps), _as_number(y.nonzero))
        steps |= np.asarray(paths) > 0
    if y.steps.any():
        paths = jax.vmap(apply, (None, 0))(_as_number(x.nonzero), _as_number(y.steps))
        steps |= np.asarray(paths) > 0
    result = unknown(out.dtype, steps, any_far([x, y], bound), bound)
    # A product with zero is a zero with the other's sign.
    has_zeros = not (x.nonzero.all() and y.nonzero.all())
    return [result._replace(sign_varies=has_zeros)]


def _as_number(mask):
    return jnp.asarray(mask, jnp.float32)


def _reduce(eqn, args, bound: float) -> list[Spread]:
    x, axes = args[0], tuple(eqn.params["axes"])
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    counts = _can_win(name, x, axes)
    steps = (x.steps & counts).any(axis=tuple(a + 1 for a in axes))
    far = (x.far(bound) & counts).any(axis=axes)
    if name not in _REDUCED or not x.low.size:
        return [unknown(dtype, steps, far, bound)]
    with np.errstate(all="ignore"):
        low, high = _REDUCED[name](x, axes, dtype)
    result = spread(dtype, steps, low, high, far, bound)
    if name != "reduce_max":
        return [result]
    rows = np.arange(result.low.size).reshape(result.shape)
    return [result._replace(largest=Largest(x.steps, axes, rows))]


def _can_win(name: str, x: Spread, axes):
    """A masked element far below the others is never the largest."""
    if name == "reduce_max" and x.low.size:
        return ~(x.high < x.low.max(axis=axes, keepdims=True))
    if name == "reduce_min" and x.low.size:
        return ~(x.low > x.high.min(axis=axes, keepdims=True))
    return True


def _sum(x: Spread, axes, dtype):
    """Each term may add one rounding error; the order of the sum is unknown."""
    low, high = x.low.sum(axis=axes), x.high.sum(axis=axes)
    if not jnp.issubdtype(dtype, jnp.floating):
        return low, high
    slack = float(jnp.finfo(dtype).eps) * x.low.size / max(low.size, 1)
    below, above = abs(x.low).sum(axis=axes), abs(x.high).sum(axis=axes)
    return low - slack * below, high + slack * above


def _place(x: Spread, axes, dtype):
    """`argmax` and `argmin` give a place along the axis."""
    return 0.0, x.shape[axes[0]] - 1.0


_REDUCED = {
    "reduce_sum": _sum,
    "reduce_max": lambda x, axes, _: (x.low.max(axis=axes), x.high.max(axis=axes)),
    "reduce_min": lambda x, axes, _: (x.low.min(axis=axes), x.high.min(axis=axes)),
    "argmax": _place,
    "argmin": _place,
}


def _accumulate(eqn, args, bound: float) -> list[Spread]:
    (x,), axis, dtype = args, eqn.params["axis"], eqn.outvars[0].aval.dtype
    run = functools.partial(_running, reverse=eqn.params["reverse"])
    steps = run(np.logical_or, x.steps, axis + 1)
    far = run(np.logical_or, x.far(bound), axis)
    extreme = {"cummax": np.maximum, "cummin": np.minimum}.get(eqn.primitive.name)
    if extreme is None:
        return [unknown(dtype, steps, far, bound)]
    low, high = run(extreme, x.low, axis), run(extreme, x.high, axis)
    return [spread(dtype, steps, low, high, True, bound)]


def _running(combine, values, axis: int, reverse: bool):
    turn = (lambda v: np.flip(v, axis)) if reverse else (lambda v: v)
    return turn(combine.accumulate(turn(values), axis))


def _window(eqn, args, bound: float) -> list[Spread]:
    """Pooling; the initial value must be a constant."""
    x, *initial = args
    if len(args) > 2 or any(isinstance(v, Spread) for v in initial):
        return everything(eqn, args, bound)
    p, out = eqn.params, eqn.outvars[0].aval
    steps = lax.reduce_window(
        _as_number(x.steps),
        0.0,
        lax.max,
        (1, *p["window_dimensions"]),
        (1, *p["window_strides"]),
        [(0, 0), *p["padding"]],
        (1, *p["base_dilation"]),
        (1, *p["window_dilation"]),
    )
    far = any_far(as_spreads(args, bound), bound)
    return [unknown(out.dtype, np.asarray(steps) > 0, far, bound)]


def _sort(eqn, args, bound: float) -> list[Spread]:
    axis, args = eqn.params["dimension"], as_spreads(args, bound)
    steps = np.any([x.steps for x in args], axis=0)
    steps = np.broadcast_to(steps.any(axis=axis + 1, keepdims=True), steps.shape)
    return [_anywhere(v.aval, steps, x, axis, bound) for v, x in zip(eqn.outvars, args)]


def _anywhere(out, steps, x: Spread, axis: int, bound: float) -> Spread:
    """Elements of `x` in an unknown order along the axis."""
    if not x.low.size:
        return x
    low, high = x.low.min(axis, keepdims=True), x.high.max(axis, keepdims=True)
    return spread(out.dtype, steps, low, high, True, bound)


_PRIMITIVES: dict[Callable[..., list[Spread]], str] = {
    functools.partial(move, (0,), bind_same): """
        broadcast_in_dim dynamic_slice reshape rev slice split squeeze transpose
    """,
    functools.partial(move, (0, 1), bind_same): "dynamic_update_slice pad",
    functools.partial(move, None, bind_same): "concatenate stack",
    _bilinear: "dot_general conv_general_dilated",
    _accumulate: "cumsum cumprod cummax cummin cumlogsumexp",
    _reduce: """
        reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor
        argmax argmin
    """,
    _window: "reduce_window reduce_window_sum reduce_window_max reduce_window_min",
    gather: "gather",
    scatter: "scatter",
    scatter_add: "scatter-add scatter_add",
    _select: "select_n",
    _sort: "sort",
}
RULES = {
    **{name: rule for rule, names in _PRIMITIVES.items() for name in names.split()},
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(IDENTITIES, _identity),
}
