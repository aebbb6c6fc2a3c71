"""Shows from a program that it treats the examples of a batch alike and alone.

Only then does `method="fold"` give what the definition gives, whatever the numbers are:
that they agree for some numbers shows little where a parameter is zero, say. What has
no rule counts as mixing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tdjax import _jaxprs
from tdjax._steps.axes import PER_STEP, PER_STEP_OR_BATCH, Axis, map_results
from tdjax._tuning.batch_rules import (
    Mixed,
    Rows,
    Shared,
    Value,
    apply_rule,
    require,
    require_rows,
)


def find_mixing(
    call: Callable, arrays: list, axes: list, out_axes: Any, batch: int
) -> str | None:
    """What in a folded `call(arrays)` may mix examples; None if nothing does.

    `axes` and `out_axes` are the time axes that the arrays and the results had, and
    `batch` is the number of examples of one step.
    """
    out: list[Axis] = []

    def leaves_of(arrays):
        results = call(arrays)
        out[:] = []
        map_results(lambda y, axis: out.append(axis), results, out_axes)
        return jax.tree.leaves(results)

    program = jax.make_jaxpr(leaves_of)(arrays)
    values = [Shared() if axis is PER_STEP else Rows(0) for axis in axes]
    try:
        results = _run(program, values)
    except Mixed as error:
        return str(error)
    if not all(_is_allowed(*pair) for pair in zip(results, out, strict=True)):
        return "a result without a batch axis"
    one_step = [_with_size(*pair, batch) for pair in zip(arrays, axes)]
    try:
        other = jax.make_jaxpr(leaves_of)(one_step)
    except Exception:  # `fun` may raise anything for a batch of another size.
        return "its size"
    return None if _outline(program) == _outline(other) else "its size"


def _with_size(x, axis: Axis, batch: int) -> Any:
    """The type of `x` for a batch of another size, one step's if that is another."""
    if axis is PER_STEP:
        return x
    size = batch if batch < x.shape[0] else batch + 1
    return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)


def _outline(program) -> list[Any]:
    """What is the same for every size of a batch: all but the shapes."""
    jaxpr, consts = _jaxprs.open_program(program)
    lines: list[Any] = [_number(x) for x in consts]
    for eqn in jaxpr.eqns:
        numbers = [_number(v.val) for v in eqn.invars if _jaxprs.is_literal(v)]
        options = {k: v for k, v in eqn.params.items() if isinstance(v, int | float)}
        inner = [_outline(each) for each in _jaxprs.programs(eqn)]
        lines.append((eqn.primitive.name, numbers, options, inner))
    return lines


def _number(x: Any) -> Any:
    """A scalar's value; for other constants, which the rules look at, their type."""
    is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if is_key or isinstance(x, Tracer) or np.ndim(x) > 0:
        return str(jax.typeof(x))
    return np.asarray(x).tobytes()


def _is_allowed(result: Value, axis: Axis) -> bool:
    if isinstance(result, Rows):
        return result == Rows(0) and (
            axis is PER_STEP_OR_BATCH or isinstance(axis, int)
        )
    return not isinstance(axis, int) or 0 in result.uniform


def _run(program, values: list[Value]) -> list[Value]:
    jaxpr, consts = _jaxprs.open_program(program)
    consts = [Shared()] * (len(consts) or len(jaxpr.constvars))
    return _jaxprs.evaluate(jaxpr, consts, values, _evaluate_equation)


def _evaluate_equation(eqn, args) -> list[Value]:
    name = eqn.primitive.name
    # A literal is a scalar.
    args = [x if isinstance(x, Rows | Shared) else Shared() for x in args]
    calls = _jaxprs.CALLS_AND_CUSTOM_DERIVATIVES
    if calls.get(name) in eqn.params:
        return _run(eqn.params[calls[name]], args)
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, args)
    return apply_rule(eqn, args)


def _scan(eqn, args) -> list[Value]:
    consts, carry, xs = _jaxprs.split_scan(eqn, args)
    body = eqn.params["jaxpr"]
    xs = [_inside(x, eqn) for x in xs]

    def run(carry):
        return _run(body, [*consts, *carry, *xs])

    carry, outs = _settle(run, carry, eqn)
    return [*carry, *map(_outside, outs)]


def _inside(x: Value, eqn) -> Value:
    """A slice along the first axis."""
    if isinstance(x, Rows):
        require(x.axis > 0, eqn)
        return x._replace(axis=x.axis - 1)
    return Shared(frozenset(axis - 1 for axis in x.uniform if axis > 0))


def _outside(y: Value) -> Value:
    if isinstance(y, Rows):
        return y._replace(axis=y.axis + 1)
    return Shared(frozenset(axis + 1 for axis in y.uniform))


def _while(eqn, args) -> list[Value]:
    cond_consts, body_consts, carry = _jaxprs.split_while(eqn, args)
    params = eqn.params

    def run(carry):
        (more,) = _run(params["cond_jaxpr"], [*cond_consts, *carry])
        require(isinstance(more, Shared), eqn)
        return _run(params["body_jaxpr"], [*body_consts, *carry])

    carry, _ = _settle(run, carry, eqn)
    return carry


def _settle(run: Callable, carry: list[Value], eqn) -> tuple[list[Value], list[Value]]:
    """What a loop carries, at its first turn and at every later one."""
    while True:
        outs = run(carry)
        after = [_either(*pair, eqn) for pair in zip(carry, outs[: len(carry)])]
        if after == carry:
            return carry, outs[len(carry) :]
        carry = after


def _either(x: Value, y: Value, eqn) -> Value:
    """What holds for both of two values."""
    if isinstance(x, Shared) and isinstance(y, Shared):
        return Shared(x.uniform & y.uniform)
    rows, other = (x, y) if isinstance(x, Rows) else (y, x)
    assert isinstance(rows, Rows)
    require_rows(rows, other, rows.axis, eqn)
    return rows


def _cond(eqn, args) -> list[Value]:
    index, *operands = args
    require(isinstance(index, Shared), eqn)
    outs = [_run(branch, operands) for branch in eqn.params["branches"]]
    either = functools.partial(_either, eqn=eqn)
    return [functools.reduce(either, column) for column in zip(*outs, strict=True)]


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}
