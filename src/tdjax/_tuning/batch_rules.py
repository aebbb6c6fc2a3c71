"""Where the examples of a batch are after each primitive, if they stay apart.

A value is `Shared`, the same whatever the examples are, or `Rows`: along one of its
axes, slice i is the same function of example i for every i. A rule gives the axis on
which this holds for a result, and raises `Mixed` if it holds on none.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tdjax._jaxprs import ELEMENTWISE, IDENTITIES


class Rows(NamedTuple):
    """The examples are along `axis`, `per_example` elements of it for each."""

    axis: int
    per_example: int = 1


class Shared(NamedTuple):
    """All slices along each of the axes `uniform` are equal."""

    uniform: frozenset[int] = frozenset()


Value = Rows | Shared


class Mixed(Exception):
    """A result may depend on other examples, or on the place in the batch."""


def require(condition: Any, eqn) -> None:
    """Raises `Mixed` unless the condition holds."""
    if not condition:
        raise Mixed(eqn.primitive.name)


def _shape(atom) -> tuple[int, ...]:
    return atom.aval.shape


def _rows_of(args) -> list[tuple[int, Rows]]:
    return [(i, x) for i, x in enumerate(args) if isinstance(x, Rows)]


def _same_axis(eqn, args, operands=None) -> Rows:
    """All operands with examples have them on one axis; there, the others are uniform.

    A shared operand of another rank is a scalar.
    """
    operands = range(len(args)) if operands is None else operands
    _, rows = _rows_of(args)[0]
    shape = next(_shape(eqn.invars[i]) for i in operands if args[i] == rows)
    for i in operands:
        value, own = args[i], _shape(eqn.invars[i])
        if isinstance(value, Rows):
            require(value == rows and own[rows.axis] == shape[rows.axis], eqn)
        elif own:
            repeated = own[rows.axis] == 1 < shape[rows.axis]
            require(repeated or rows.axis in value.uniform, eqn)
    others = [x for i, x in _rows_of(args) if i not in operands]
    require(not others, eqn)
    return rows


def apply_rule(eqn, args: list[Value]) -> list[Value]:
    """What one primitive makes of its operands."""
    name = eqn.primitive.name
    if name in IDENTITIES:
        return args
    if not any(isinstance(x, Rows) for x in args):
        return [Shared(frozenset(_uniform(eqn, args)))] * len(eqn.outvars)
    if name not in _RULES:
        raise Mixed(name)
    return [_RULES[name](eqn, args)] * len(eqn.outvars)


def _uniform(eqn, args) -> set[int]:
    """The axes on which a shared result is uniform.

    Equal slices stay equal where those of different examples would stay apart.
    """
    name = eqn.primitive.name
    uniform = _MADE_UNIFORM[name](eqn, args) if name in _MADE_UNIFORM else set()
    pairs = [(i, axis) for i, x in enumerate(args) for axis in x.uniform]
    for i, axis in pairs if name in _RULES else ():
        try:
            rows = _RULES[name](eqn, [*args[:i], Rows(axis), *args[i + 1 :]])
        except Mixed:
            continue
        if rows.per_example == 1:
            uniform.add(rows.axis)
    return uniform


def _elementwise(eqn, args) -> Rows:
    rows = _same_axis(eqn, args)
    shape = next(_shape(v) for v, x in zip(eqn.invars, args) if x == rows)
    require(shape[rows.axis] == _shape(eqn.outvars[0])[rows.axis], eqn)
    return rows


def _broadcast_in_dim(eqn, args) -> Rows:
    rows, places = args[0], eqn.params["broadcast_dimensions"]
    to = places[rows.axis]
    require(_shape(eqn.invars[0])[rows.axis] == _shape(eqn.outvars[0])[to], eqn)
    return rows._replace(axis=to)


def _repeated(eqn, args) -> set[int]:
    shape, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    places = eqn.params["broadcast_dimensions"]
    own = {to for size, to in zip(shape, places) if size == out[to]}
    return set(range(len(out))) - own


def _other_axes(eqn, args) -> set[int]:
    return set(range(len(_shape(eqn.outvars[0])))) - {eqn.params["dimension"]}


def _reshape(eqn, args) -> Rows:
    (rows, *_), shape, out = args, _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    count = shape[rows.axis] // rows.per_example
    before = math.prod(shape[: rows.axis])
    block = rows.per_example * math.prod(shape[rows.axis + 1 :])
    for axis, size in enumerate(out):
        per_example, remainder = divmod(size, max(count, 1))
        same_place = math.prod(out[:axis]) == before and not remainder
        if same_place and per_example * math.prod(out[axis + 1 :]) == block:
            return Rows(axis, per_example)
    raise Mixed("reshape")


def _uniform_after_reshape(eqn, args) -> set[int]:
    """All axes if all are uniform, and new axes of size 1."""
    shape, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    differ = set(range(len(shape))) - args[0].uniform
    if not differ:
        return set(range(len(out)))
    if any(shape[axis] == 1 for axis in differ):
        return set()
    return {axis for axis, size in enumerate(out) if size == 1}


def _transpose(eqn, args) -> Rows:
    (rows,), order = args, eqn.params["permutation"]
    return rows._replace(axis=order.index(rows.axis))


def _without(eqn, args, removed) -> Rows:
    """The same axis, after others were removed."""
    rows = _same_axis(eqn, args)
    removed = {axis % len(_shape(eqn.invars[0])) for axis in removed}
    require(rows.axis not in removed, eqn)
    return rows._replace(axis=rows.axis - sum(axis < rows.axis for axis in removed))


def _squeeze(eqn, args) -> Rows:
    return _without(eqn, args, eqn.params["dimensions"])


def _tile(eqn, args) -> Rows:
    require(eqn.params["reps"][args[0].axis] == 1, eqn)
    return args[0]


def _stack(eqn, args) -> Rows:
    rows = _same_axis(eqn, args)
    return rows._replace(axis=rows.axis + (eqn.params["axis"] <= rows.axis))


def _reduce(eqn, args) -> Rows:
    # `reduce` has an initial value for each operand, which is a scalar.
    return _without(eqn, args, eqn.params.get("axes", eqn.params.get("dimensions")))


def _along(parameter: str):
    """Works along one axis, or several, and alike on all others."""

    def rule(eqn, args) -> Rows:
        rows, axes = _same_axis(eqn, args), eqn.params[parameter]
        rank = len(_shape(eqn.invars[0]))
        axes = (axes,) if isinstance(axes, int) else axes
        require(rows.axis not in {axis % rank for axis in axes}, eqn)
        return rows

    return rule


def _on_last_axes(number: Callable[[Any], int]):
    """Linear algebra on the last axes, alike for all before them."""

    def rule(eqn, args) -> Rows:
        rows = _same_axis(eqn, args)
        ranks = {len(_shape(v)) for v in eqn.invars}
        require(len(ranks) == 1 and rows.axis < ranks.pop() - number(eqn), eqn)
        return rows

    return rule


def _whole_axis(size: Callable[[Any, int], bool], data: int = 1):
    """Cuts or pads, and leaves the axis of the examples whole: `size(eqn, axis)`."""

    def rule(eqn, args) -> Rows:
        rows = _same_axis(eqn, args, range(data))
        require(size(eqn, rows.axis), eqn)
        return rows

    return rule


def _is_whole(eqn, axis: int) -> bool:
    return _shape(eqn.outvars[0])[axis] == _shape(eqn.invars[0])[axis]


def _is_not_reversed(eqn, axis: int) -> bool:
    strides = eqn.params["strides"]
    return _is_whole(eqn, axis) and (strides is None or strides[axis] == 1)


def _is_not_padded(eqn, axis: int) -> bool:
    return eqn.params["padding_config"][axis] == (0, 0, 0)


def _is_replaced(eqn, axis: int) -> bool:
    operand, update, *_ = eqn.invars
    return _shape(operand)[axis] == _shape(update)[axis]


def _has_no_window(eqn, axis: int) -> bool:
    p = eqn.params
    names = "window_dimensions", "window_strides", "base_dilation", "window_dilation"
    ones = all(p.get(name) is None or p[name][axis] == 1 for name in names)
    return ones and tuple(p["padding"][axis]) == (0, 0)


def _dot_general(eqn, args) -> Rows:
    (contracted, batched) = eqn.params["dimension_numbers"]
    free = []
    for v, contract, batch in zip(eqn.invars, contracted, batched):
        axes = range(len(_shape(v)))
        free.append([axis for axis in axes if axis not in (*contract, *batch)])
    first_free = len(batched[0]), len(batched[0]) + len(free[0])
    found = set()
    for side, rows in _rows_of(args):
        if rows.axis in batched[side]:
            place = batched[side].index(rows.axis)
            other = args[1 - side]
            if isinstance(other, Shared):
                require(batched[1 - side][place] in other.uniform, eqn)
            found.add(rows._replace(axis=place))
        else:
            # With examples on both sides, each would meet all others.
            require(rows.axis in free[side] and len(_rows_of(args)) == 1, eqn)
            place = first_free[side] + free[side].index(rows.axis)
            found.add(rows._replace(axis=place))
    require(len(found) == 1, eqn)
    return found.pop()


def _convolution(eqn, args) -> Rows:
    image, kernel = args
    lhs, _, out = eqn.params["dimension_numbers"]
    is_batch = isinstance(image, Rows) and image.axis == lhs[0]
    require(is_batch and isinstance(kernel, Shared), eqn)
    require(eqn.params["batch_group_count"] == 1, eqn)
    return image._replace(axis=out[0])


def _gather(eqn, args) -> Rows:
    operand, indices = args
    numbers = eqn.params["dimension_numbers"]
    shape, rank = _shape(eqn.invars[0]), len(_shape(eqn.outvars[0]))
    looked_up = [d for d in range(rank) if d not in numbers.offset_dims]
    pairs = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    if isinstance(operand, Shared):
        (rows,) = (x for _, x in _rows_of(args))
        require(rows.axis < len(looked_up), eqn)
        if rows.axis in pairs[1]:
            place = pairs[0][pairs[1].index(rows.axis)]
            require(place in operand.uniform, eqn)
        return rows._replace(axis=looked_up[rows.axis])
    if operand.axis in pairs[0]:
        place = pairs[1][pairs[0].index(operand.axis)]
        require_rows(operand, indices, place, eqn)
        return operand._replace(axis=looked_up[place])
    whole = eqn.params["slice_sizes"][operand.axis] == shape[operand.axis]
    is_moved = operand.axis in numbers.start_index_map
    require(whole and not is_moved and isinstance(indices, Shared), eqn)
    gone = (*numbers.collapsed_slice_dims, *pairs[0])
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    require(operand.axis in kept, eqn)
    return operand._replace(axis=numbers.offset_dims[kept.index(operand.axis)])


def require_rows(rows: Rows, other: Value, axis: int, eqn) -> None:
    """Requires the examples of another operand on `axis`, or nothing that differs."""
    if isinstance(other, Rows):
        require(other == rows._replace(axis=axis), eqn)
    else:
        require(axis in other.uniform, eqn)


def _scatter(eqn, args) -> Rows:
    """Whole examples are written to places that all share."""
    operand, indices, updates = args
    numbers = eqn.params["dimension_numbers"]
    shape, update_shape = _shape(eqn.invars[0]), _shape(eqn.invars[2])
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    if isinstance(operand, Rows):
        axis, rows = operand.axis, operand
    else:
        require(isinstance(updates, Rows), eqn)
        require(updates.axis in numbers.update_window_dims, eqn)
        axis = kept[numbers.update_window_dims.index(updates.axis)]
        rows = updates._replace(axis=axis)
        require(axis in operand.uniform, eqn)
    is_moved = axis in numbers.scatter_dims_to_operand_dims
    require(axis in kept and not is_moved and isinstance(indices, Shared), eqn)
    place = numbers.update_window_dims[kept.index(axis)]
    require(update_shape[place] == shape[axis], eqn)
    require_rows(rows, updates, place, eqn)
    return rows


# Axes on which a primitive makes its result uniform.
_MADE_UNIFORM: dict[str, Callable[..., set[int]]] = {
    "broadcast_in_dim": _repeated,
    "iota": _other_axes,
    "reshape": _uniform_after_reshape,
}
_PRIMITIVES: dict[Callable[..., Rows], str] = {
    _broadcast_in_dim: "broadcast_in_dim",
    _reshape: "reshape",
    _transpose: "transpose",
    _squeeze: "squeeze",
    _stack: "stack",
    _tile: "tile",
    _reduce: """
        reduce reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or
        reduce_xor argmax argmin
    """,
    _along("axis"): "cumsum cumprod cummax cummin cumlogsumexp split",
    _along("dimension"): "sort concatenate",
    _along("dimensions"): "rev",
    _on_last_axes(lambda eqn: 1): "top_k",
    _on_last_axes(lambda eqn: 2): """
        cholesky eigh lu qr geqrf householder_product svd triangular_solve
    """,
    _on_last_axes(lambda eqn: len(eqn.params["fft_lengths"])): "fft",
    _whole_axis(_is_whole): "dynamic_slice",
    _whole_axis(_is_not_reversed): "slice",
    _whole_axis(_is_not_padded): "pad",
    _whole_axis(_is_replaced, 2): "dynamic_update_slice",
    _whole_axis(_has_no_window): """
        reduce_window reduce_window_sum reduce_window_max reduce_window_min
    """,
    _dot_general: "dot_general",
    _convolution: "conv_general_dilated",
    _gather: "gather",
    _scatter: "scatter scatter-add scatter_add scatter_mul scatter_min scatter_max",
}
_RULES: dict[str, Callable[..., Rows]] = {
    **dict.fromkeys((*ELEMENTWISE, "select_n"), _elementwise),
    **{name: rule for rule, names in _PRIMITIVES.items() for name in names.split()},
}
