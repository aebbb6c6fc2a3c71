"""Where the examples of a batch are after each primitive, if they stay apart.

A rule says on which axis of the result slice i is a function of example i alone, the
same for every i. Where there is none, the result is `Mixed`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from tdjax._jaxprs import ELEMENTWISE, IDENTITIES
from tdjax._tuning.batch_values import (
    LARGE_PRIME,
    Mixed,
    PerStep,
    Rows,
    Shared,
    Value,
    any_number,
    axes_of_examples,
    follows_examples,
)


class _NoRule(Exception):
    """There is no axis along which the operation keeps examples apart."""


def require(condition: Any) -> None:
    """Raises an error that makes the result `Mixed`, unless the condition holds."""
    if not condition:
        raise _NoRule


# Parameters that repeat the shape of a result, which is looked at itself, here and
# where programs are compared.
SHAPES = frozenset(
    ("shape", "new_sizes", "sizes", "slice_sizes", "limit_indices", "reps")
)
# What they return can't be told from their operands.
_OPAQUE = frozenset(("io_callback", "pure_callback", "rng_uniform"))


def _uses_size(eqn) -> bool:
    """Whether an operation does something else for another number of examples."""
    if eqn.primitive.name == "dim_as_value":
        return True
    options = [value for name, value in eqn.params.items() if name not in SHAPES]
    return any(map(follows_examples, jax.tree.leaves(options)))


def apply_rule(eqn, args: list[Value]) -> list[Value]:
    """What one primitive makes of its operands."""
    name, outs = eqn.primitive.name, [v.aval for v in eqn.outvars]
    if name in IDENTITIES:
        return args
    for x in args:
        if isinstance(x, Mixed):
            return [x] * len(outs)
    if name in _OPAQUE or _uses_size(eqn):
        return [Mixed(name)] * len(outs)
    has_rows = any(isinstance(x, Rows) for x in args)
    has_keys = any(isinstance(x, PerStep) for x in args)
    is_sized = any(axes_of_examples(out.shape) for out in outs)
    if not has_rows and not is_sized:
        return [PerStep() if has_keys else Shared()] * len(outs)
    if has_keys:
        return [Mixed("random keys")] * len(outs)
    rules = _RULES if has_rows else _NEW_ROWS
    try:
        require(name in rules)
        rows = rules[name](eqn, args)
        require(all(axes_of_examples(out.shape) == [rows.axis] for out in outs))
    except _NoRule:
        return [Mixed(name)] * len(outs)
    return [rows] * len(outs)


def _shape(atom) -> tuple[Any, ...]:
    return atom.aval.shape


def _rows_of(args) -> list[tuple[int, Rows]]:
    return [(i, x) for i, x in enumerate(args) if isinstance(x, Rows)]


def _same_axis(eqn, args) -> Rows:
    """All operands with examples have them on one axis; the others are repeated there.

    A shared operand of another rank is a scalar.
    """
    (_, rows), *others = _rows_of(args)
    require(all(x == rows for _, x in others))
    for v, value in zip(eqn.invars, args):
        if not isinstance(value, Rows) and _shape(v):
            require(_shape(v)[rows.axis] == 1)
    return rows


def _broadcast_in_dim(eqn, args) -> Rows:
    return args[0].on(eqn.params["broadcast_dimensions"][args[0].axis])


def _new_rows(eqn, args) -> Rows:
    """The same for every example."""
    return _rows_in(_shape(eqn.outvars[0]))


def _rows_in(shape) -> Rows:
    axes = axes_of_examples(shape)
    require(axes)
    return Rows(axes[0], _per_example(shape[axes[0]]))


def _per_example(size) -> int:
    """How many elements of an axis each example has."""
    number = LARGE_PRIME if isinstance(size, int) else any_number()
    per_example, remainder = divmod(size, number)
    require(isinstance(per_example, int) and isinstance(remainder, int))
    require(remainder == 0)
    return per_example


def _iota(eqn, args) -> Rows:
    rows = _new_rows(eqn, args)
    require(rows.axis != eqn.params["dimension"])
    return rows


def _reshape(eqn, args) -> Rows:
    require(eqn.params["dimensions"] is None)  # It would be transposed before.
    before, out = _shape(eqn.invars[0])[: args[0].axis], _shape(eqn.outvars[0])
    rows = _rows_in(out)
    # With as many elements before an axis, as many of them are one example's.
    require(math.prod(before) == math.prod(out[: rows.axis]))
    return rows


def _transpose(eqn, args) -> Rows:
    return args[0].on(eqn.params["permutation"].index(args[0].axis))


def _without(eqn, args, removed) -> Rows:
    """The same axis, after others were removed."""
    rows = _same_axis(eqn, args)
    removed = {axis % len(_shape(eqn.invars[0])) for axis in removed}
    require(rows.axis not in removed)
    return rows.on(rows.axis - sum(axis < rows.axis for axis in removed))


def _squeeze(eqn, args) -> Rows:
    return _without(eqn, args, eqn.params["dimensions"])


def _unstack(eqn, args) -> Rows:
    return _without(eqn, args, [eqn.params["axis"]])


def _tile(eqn, args) -> Rows:
    require(eqn.params["reps"][args[0].axis] == 1)
    return args[0]


def _stack(eqn, args) -> Rows:
    rows = _same_axis(eqn, args)
    return rows.on(rows.axis + (eqn.params["axis"] <= rows.axis))


def _reduce(eqn, args) -> Rows:
    # `reduce` has an initial value for each operand, which is a scalar.
    return _without(eqn, args, eqn.params.get("axes", eqn.params.get("dimensions")))


def _along(parameter: str, default: Any = None):
    """Works along one axis, or several, and alike on all others."""

    def rule(eqn, args) -> Rows:
        rows, axes = _same_axis(eqn, args), eqn.params.get(parameter, default)
        rank = len(_shape(eqn.invars[0]))
        axes = axes if isinstance(axes, tuple | list) else [axes]
        require(rows.axis not in {axis % rank for axis in axes})
        return rows

    return rule


def _on_last_axes(number: Callable[[Any], int]):
    """Linear algebra on the last axes, alike for all before them."""

    def rule(eqn, args) -> Rows:
        rows = _same_axis(eqn, args)
        ranks = {len(_shape(v)) for v in eqn.invars}
        require(len(ranks) == 1 and rows.axis < ranks.pop() - number(eqn))
        return rows

    return rule


def _whole_axis(is_whole: Callable[[Any, int], bool]):
    """Cuts or pads, and leaves the axis of the examples whole."""

    def rule(eqn, args) -> Rows:
        rows = _same_axis(eqn, args)
        require(is_whole(eqn, rows.axis))
        return rows

    return rule


def _is_not_cut(eqn, axis: int) -> bool:
    strides = eqn.params.get("strides")
    is_whole = _shape(eqn.outvars[0])[axis] == _shape(eqn.invars[0])[axis]
    return is_whole and (strides is None or strides[axis] == 1)


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
    (contracted, batched), found = eqn.params["dimension_numbers"], set()
    free = [
        [axis for axis in range(len(_shape(v))) if axis not in (*contract, *batch)]
        for v, contract, batch in zip(eqn.invars, contracted, batched)
    ]
    first_free = len(batched[0]), len(batched[0]) + len(free[0])
    for side, rows in _rows_of(args):
        if rows.axis in batched[side]:
            found.add(rows.on(batched[side].index(rows.axis)))
        else:
            require(rows.axis in free[side])
            place = first_free[side] + free[side].index(rows.axis)
            found.add(rows.on(place))
    # With examples on a free axis of both sides, each would meet all others.
    require(len(found) == 1)
    return found.pop()


def _convolution(eqn, args) -> Rows:
    image, kernel = args
    lhs, _, out = eqn.params["dimension_numbers"]
    require(isinstance(kernel, Shared) and image.axis == lhs[0])
    require(eqn.params["batch_group_count"] == 1)
    return image.on(out[0])


def _gather(eqn, args) -> Rows:
    operand, indices = args
    numbers = eqn.params["dimension_numbers"]
    rank = len(_shape(eqn.outvars[0]))
    looked_up = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    pairs = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    if isinstance(operand, Shared):
        # What holds for the places of one step may not hold for those of all.
        is_promised = eqn.params["unique_indices"] or eqn.params["indices_are_sorted"]
        require(indices.axis < len(looked_up) and not is_promised)
        return indices.on(looked_up[indices.axis])
    if operand.axis in pairs[0]:
        place = pairs[1][pairs[0].index(operand.axis)]
        require(indices == operand.on(place))
        return operand.on(looked_up[place])
    whole = (
        eqn.params["slice_sizes"][operand.axis] == _shape(eqn.invars[0])[operand.axis]
    )
    is_moved = operand.axis in numbers.start_index_map
    require(whole and not is_moved and isinstance(indices, Shared))
    gone = (*numbers.collapsed_slice_dims, *pairs[0])
    kept = [axis for axis in range(len(_shape(eqn.invars[0]))) if axis not in gone]
    return operand.on(numbers.offset_dims[kept.index(operand.axis)])


def _scatter(eqn, args) -> Rows:
    """Whole examples are written to places that all share; or each to its own."""
    operand, indices, updates = args
    numbers = eqn.params["dimension_numbers"]
    require(isinstance(operand, Rows) and isinstance(updates, Rows))
    batched = numbers.operand_batching_dims
    if operand.axis in batched:
        place = numbers.scatter_indices_batching_dims[batched.index(operand.axis)]
        rank = len(_shape(eqn.invars[2]))
        in_updates = [a for a in range(rank) if a not in numbers.update_window_dims]
        require(indices == operand.on(place))
        require(updates == operand.on(in_updates[place]))
        return operand
    gone = (*numbers.inserted_window_dims, *batched)
    kept = [axis for axis in range(len(_shape(eqn.invars[0]))) if axis not in gone]
    is_moved = operand.axis in numbers.scatter_dims_to_operand_dims
    require(operand.axis in kept and not is_moved and isinstance(indices, Shared))
    place = numbers.update_window_dims[kept.index(operand.axis)]
    # Both sizes depend on n: they are equal.
    require(updates == operand.on(place))
    return operand


_PRIMITIVES: dict[Callable[..., Rows], str] = {
    _same_axis: """
        select_n complex le_to lt_to bessel_i0e bessel_i1e igamma igammac
        igamma_grad_a regularized_incomplete_beta polygamma zeta clz population_count
    """,
    _broadcast_in_dim: "broadcast_in_dim",
    _reshape: "reshape",
    _transpose: "transpose",
    _squeeze: "squeeze",
    _stack: "stack",
    _unstack: "unstack",
    _tile: "tile",
    _reduce: """
        reduce reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or
        reduce_xor argmax argmin
    """,
    _along("axis"): "cumsum cumprod cummax cummin cumlogsumexp split",
    _along("axis", -1): "top_k",
    _along("dimension"): "sort concatenate",
    _along("dimensions"): "rev",
    _on_last_axes(lambda eqn: 2): """
        cholesky eigh lu qr geqrf householder_product svd triangular_solve
    """,
    _on_last_axes(lambda eqn: len(eqn.params["fft_lengths"])): "fft",
    _whole_axis(_is_not_cut): "dynamic_slice slice",
    _whole_axis(_is_not_padded): "pad",
    _whole_axis(_is_replaced): "dynamic_update_slice",
    _whole_axis(_has_no_window): """
        reduce_window reduce_window_sum reduce_window_max reduce_window_min
        select_and_scatter_add select_and_gather_add
    """,
    _dot_general: "dot_general",
    _convolution: "conv_general_dilated",
    _gather: "gather",
    _scatter: "scatter scatter-add scatter_add scatter_mul scatter_min scatter_max",
}
_RULES: dict[str, Callable[..., Rows]] = {
    **dict.fromkeys(ELEMENTWISE, _same_axis),
    **{name: rule for rule, names in _PRIMITIVES.items() for name in names.split()},
}
# How shared numbers are repeated for each example.
_NEW_ROWS: dict[str, Callable[..., Rows]] = {
    "broadcast_in_dim": _new_rows,
    "tile": _new_rows,
    "iota": _iota,
}
