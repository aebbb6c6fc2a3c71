"""How each primitive passes dependence and range from its operands to its results."""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdjax._ranges import RANGES
from tdjax._spread import Spread, as_spreads, spread, within_bound


def everything(eqn, args, bound: float) -> list[Spread]:
    """Every output element depends on what any input element depends on."""
    union = np.any([x.any_steps for x in as_spreads(args)], axis=0)
    return [_same_everywhere(union, v.aval.shape, bound) for v in eqn.outvars]


def _same_everywhere(steps, shape, bound: float) -> Spread:
    steps = steps.reshape(-1, *(1,) * len(shape))
    return within_bound(np.broadcast_to(steps, (len(steps), *shape)), bound)


def _elementwise(eqn, args, bound: float) -> list[Spread]:
    """An output element depends on the operands' elements at the same place."""
    args = as_spreads(args)
    shape = eqn.outvars[0].aval.shape
    steps = np.any([_align(x.steps, shape) for x in args], axis=0)
    ranges = RANGES.get(eqn.primitive.name)
    if ranges is None:
        return [within_bound(steps, bound)]
    with np.errstate(all="ignore"):
        low, high = ranges(eqn, *(_range(x, shape) for x in args))
    return [spread(steps, *_unless_it_wraps(eqn, low, high), bound)]


def _unless_it_wraps(eqn, low, high):
    """Integers beyond their dtype wrap around, and their range is not known."""
    dtype = eqn.outvars[0].aval.dtype
    if not np.issubdtype(dtype, np.integer):
        return low, high
    fits = (low >= np.iinfo(dtype).min) & (high <= np.iinfo(dtype).max)
    return np.where(fits, low, np.nan), np.where(fits, high, np.nan)


def _range(x: Spread, shape) -> np.ndarray:
    return np.stack([np.broadcast_to(bound, shape) for bound in (x.low, x.high)])


def _align(steps, shape):
    """A scalar operand goes with every element."""
    steps = steps.reshape(
        len(steps), *((1,) * (len(shape) + 1 - steps.ndim)), *steps.shape[1:]
    )
    return np.broadcast_to(steps, (len(steps), *shape))


def _select(eqn, args, bound: float) -> list[Spread]:
    """Where the choice is a constant only the chosen case counts."""
    which, *cases = as_spreads(args)
    shape = cases[0].shape
    low, high = np.broadcast_to(which.low, shape), np.broadcast_to(which.high, shape)
    taken = [(low <= i) & (i <= high) for i in range(len(cases))]
    steps = np.any([x.steps & on for x, on in zip(cases, taken)], axis=0)
    open_choice = _align(which.steps, shape) & (low != high)
    lows = [np.where(on, x.low, np.inf) for x, on in zip(cases, taken)]
    highs = [np.where(on, x.high, -np.inf) for x, on in zip(cases, taken)]
    return [
        spread(steps | open_choice, np.min(lows, axis=0), np.max(highs, axis=0), bound)
    ]


def _move(data: tuple[int, ...] | None, move: Callable[..., Any], eqn, args, bound):
    """Each output element is an element of the operands `data`, at a known place.

    Which one is found by moving the elements' numbers in the place of the elements.
    """
    data = tuple(range(len(args))) if data is None else data
    if any(isinstance(x, Spread) for i, x in enumerate(args) if i not in data):
        return everything(eqn, args, bound)
    spreads = as_spreads([args[i] for i in data])
    numbered = dict(enumerate(args)) | dict(zip(data, _numbers(spreads)))
    outs = move(eqn, *numbered.values())
    steps = np.concatenate([x.flat_steps for x in spreads], axis=1)
    low = np.concatenate([x.low.ravel() for x in spreads])
    high = np.concatenate([x.high.ravel() for x in spreads])
    pick = lambda places: _pick(steps, low, high, np.asarray(places), bound)
    return [pick(out) for out in (outs if isinstance(outs, list | tuple) else [outs])]


def _numbers(spreads: list[Spread]) -> list[Any]:
    """Consecutive numbers for the elements of several arrays."""
    starts = np.cumsum([0, *(x.low.size for x in spreads)])
    ranges = [np.arange(*pair, dtype=np.int32) for pair in pairwise(starts)]
    return [jnp.asarray(r.reshape(x.shape)) for r, x in zip(ranges, spreads)]


def _pick(steps, low, high, places, bound: float) -> Spread:
    """Places below zero are of elements that are filled in from outside."""
    outside = places < 0
    return Spread(
        steps[:, places] & ~outside,
        np.where(outside, -bound, low[places]),
        np.where(outside, bound, high[places]),
    )


def _bind_move(eqn, *args):
    return eqn.primitive.bind(*args, **eqn.params)


def _gather_move(eqn, operand, indices):
    return eqn.primitive.bind(operand, indices, **{**eqn.params, "fill_value": -1})


def _scatter_move(eqn, operand, indices, updates):
    return _scatter(lax.scatter, eqn, operand, indices, updates)


def _scatter(scatter, eqn, operand, indices, updates):
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}
    return scatter(operand, indices, updates, **options)


def _gather(eqn, args, bound: float) -> list[Spread]:
    operand, indices = args
    if not isinstance(indices, Spread):
        return _move((0,), _gather_move, eqn, args, bound)
    # A row at an unknown place: it depends on its own index and on the whole operand.
    shape = eqn.outvars[0].aval.shape
    offsets = eqn.params["dimension_numbers"].offset_dims
    steps = indices.steps.any(axis=-1)
    steps = np.expand_dims(steps, [axis + 1 for axis in offsets])
    steps = np.broadcast_to(steps, (len(steps), *shape))
    if isinstance(operand, Spread):
        steps = steps | _same_everywhere(operand.any_steps, shape, bound).steps
    return [within_bound(steps, bound)]


def _scatter_add(eqn, args, bound: float) -> list[Spread]:
    operand, indices, updates = args
    if isinstance(indices, Spread):
        return everything(eqn, args, bound)
    operand, updates = as_spreads([operand, updates])
    add = lambda x, y: _scatter(lax.scatter_add, eqn, x, indices, y)
    steps = jax.vmap(add)(_as_number(operand.steps), _as_number(updates.steps))
    return [within_bound(np.asarray(steps) > 0, bound)]


def _bilinear(eqn, args, bound: float) -> list[Spread]:
    """A product counts if one factor depends on the step and the other isn't zero."""
    x, y = as_spreads(args)
    params = {**eqn.params, "preferred_element_type": np.dtype(np.float32)}
    apply = functools.partial(eqn.primitive.bind, **params)
    steps = np.zeros((len(x.steps), *eqn.outvars[0].aval.shape), bool)
    if x.steps.any():
        of_x = jax.vmap(apply, (0, None))(_as_number(x.steps), _as_number(y.nonzero))
        steps |= np.asarray(of_x) > 0
    if y.steps.any():
        of_y = jax.vmap(apply, (None, 0))(_as_number(x.nonzero), _as_number(y.steps))
        steps |= np.asarray(of_y) > 0
    return [within_bound(steps, bound)]


def _as_number(mask):
    return jnp.asarray(mask, jnp.float32)


_REDUCED_RANGES = {
    "reduce_sum": (np.sum, np.sum),
    "reduce_max": (np.max, np.max),
    "reduce_min": (np.min, np.min),
}


def _reduce(eqn, args, bound: float) -> list[Spread]:
    x, axes = args[0], tuple(eqn.params["axes"])
    name = eqn.primitive.name
    steps = (x.steps & _can_win(name, x, axes)).any(axis=tuple(a + 1 for a in axes))
    if name not in _REDUCED_RANGES or not x.low.size:
        return [within_bound(steps, bound)]
    of_low, of_high = _REDUCED_RANGES[name]
    with np.errstate(all="ignore"):
        low, high = of_low(x.low, axis=axes), of_high(x.high, axis=axes)
    return [spread(steps, low, high, bound)]


def _can_win(name: str, x: Spread, axes):
    """A masked element far below the others is never the largest."""
    if name == "reduce_max" and x.low.size:
        return x.high >= x.low.max(axis=axes, keepdims=True)
    if name == "reduce_min" and x.low.size:
        return x.low <= x.high.min(axis=axes, keepdims=True)
    return True


def _accumulate(eqn, args, bound: float) -> list[Spread]:
    axis, steps = eqn.params["axis"] + 1, args[0].steps
    if eqn.params["reverse"]:
        steps = np.flip(np.logical_or.accumulate(np.flip(steps, axis), axis), axis)
    else:
        steps = np.logical_or.accumulate(steps, axis)
    return [within_bound(steps, bound)]


def _window(eqn, args, bound: float) -> list[Spread]:
    if len(eqn.outvars) > 1:
        return everything(eqn, args, bound)
    p = eqn.params
    steps = lax.reduce_window(
        _as_number(args[0].steps),
        0.0,
        lax.max,
        (1, *p["window_dimensions"]),
        (1, *p["window_strides"]),
        [(0, 0), *p["padding"]],
        (1, *p["base_dilation"]),
        (1, *p["window_dilation"]),
    )
    return [within_bound(np.asarray(steps) > 0, bound)]


def _sort(eqn, args, bound: float) -> list[Spread]:
    axis = eqn.params["dimension"] + 1
    steps = np.any([x.steps for x in as_spreads(args)], axis=0)
    steps = np.broadcast_to(steps.any(axis=axis, keepdims=True), steps.shape)
    return [within_bound(steps, bound) for _ in eqn.outvars]


_ELEMENTWISE = frozenset(
    (
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "conj",
        "convert_element_type",
        "copy",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "optimization_barrier",
        "or",
        "pow",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    )
)

RULES: dict[str, Callable[..., list[Spread]]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **{
        name: functools.partial(_move, data, _bind_move)
        for name, data in {
            "broadcast_in_dim": (0,),
            "concatenate": None,
            "dynamic_slice": (0,),
            "dynamic_update_slice": (0, 1),
            "expand_dims": (0,),
            "pad": (0, 1),
            "reshape": (0,),
            "rev": (0,),
            "slice": (0,),
            "split": (0,),
            "squeeze": (0,),
            "transpose": (0,),
        }.items()
    },
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _bilinear),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _accumulate
    ),
    **{
        f"reduce_{name}": _reduce
        for name in ("sum", "max", "min", "prod", "and", "or", "xor")
    },
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **{f"reduce_window{kind}": _window for kind in ("", "_sum", "_max", "_min")},
    "gather": _gather,
    "scatter": functools.partial(_move, (0, 2), _scatter_move),
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
    "select_n": _select,
    "sort": _sort,
}
