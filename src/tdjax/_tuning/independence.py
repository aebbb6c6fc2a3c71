"""Shows from a program that it treats the examples of a batch alike and alone.

Only then does `method="fold"` give what the definition gives, whatever the numbers are:
that they agree for some numbers shows little where a parameter is zero, say.

The function is traced for a batch of any size, `n` (as `jax.export` does). Then the
examples are along the one axis whose size depends on `n`, and `batch_rules` says for
each operation whether it works along this axis example by example. A function that does
not work for any `n`, or computes with its value, is not shown to be right.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tdjax import _jaxprs
from tdjax._steps.axes import PER_STEP, PER_STEP_OR_BATCH, Axis, map_results
from tdjax._tuning.batch_rules import (
    Mixed,
    PerStep,
    Rows,
    Shared,
    Value,
    any_number,
    apply_rule,
    symbolic_axes,
)


def find_mixing(call: Callable, arrays: list, axes: list, out_axes: Any) -> str | None:
    """What in a folded `call(arrays)` may mix examples; None if nothing does.

    `axes` and `out_axes` are the time axes that the arrays and the results had.
    """
    out: list[Axis] = []

    def leaves_of(arrays):
        results = call(arrays)
        out[:] = []
        map_results(lambda y, axis: out.append(axis), results, out_axes)
        return jax.tree.leaves(results)

    try:
        types = [_of_any_size(*pair) for pair in zip(arrays, axes)]
        program = jax.make_jaxpr(leaves_of)(types)
    except Exception:  # `fun` may raise anything for such a batch.
        return "its size"
    values: list[Value] = [PerStep() if axis is PER_STEP else Rows(0) for axis in axes]
    results = run(program, values)
    reasons = [_reason(*pair) for pair in zip(results, out, strict=True)]
    return next(filter(None, reasons), None)


def _of_any_size(x, axis: Axis) -> Any:
    """The type of `x` for a batch of any size."""
    if axis is PER_STEP:
        return x
    shape, weak_type = (any_number(), *x.shape[1:]), jax.typeof(x).weak_type
    return jax.ShapeDtypeStruct(shape, x.dtype, weak_type=weak_type)


def _reason(result: Value, axis: Axis) -> str | None:
    """Why a result can't be split into the steps' results."""
    if isinstance(result, Mixed):
        return result.by
    if isinstance(result, PerStep):
        return None if axis is PER_STEP else "random keys"
    if isinstance(result, Rows):
        has_place = isinstance(axis, int) or axis is PER_STEP_OR_BATCH
        return None if has_place and result == Rows(0) else "its layout"
    return "a result without a batch axis" if isinstance(axis, int) else None


def run(program, values: list[Value]) -> list[Value]:
    """Runs a jaxpr, closed or without constants."""
    jaxpr, consts = _jaxprs.open_program(program)
    consts = [Shared()] * (len(consts) or len(jaxpr.constvars))
    return _jaxprs.evaluate(jaxpr, consts, values, _evaluate_equation)


def _evaluate_equation(eqn, args) -> list[Value]:
    name = eqn.primitive.name
    # A literal is a scalar.
    args = [x if isinstance(x, Value) else Shared() for x in args]
    calls = _jaxprs.CALLS_AND_CUSTOM_DERIVATIVES
    if calls.get(name) in eqn.params:
        results = run(eqn.params[calls[name]], args)
        is_custom = name not in _jaxprs.CALLS
        return _with_derivative(eqn, args, results) if is_custom else results
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, args)
    return apply_rule(eqn, args)


def _with_derivative(eqn, args, results: list[Value]) -> list[Value]:
    """The results, unless the derivative that somebody gave for them may mix.

    JAX's own derivatives of what keeps examples apart do so too.
    """
    is_float = lambda v: jnp.issubdtype(v.aval.dtype, jnp.inexact)
    pairs = list(enumerate(zip(eqn.invars, args)))
    by = [i for i, (v, x) in pairs if isinstance(x, Rows) and is_float(v)]
    if not by:
        return results

    def pull_back(operands, cotangents):
        def call(primals):
            given = dict(zip(by, primals))
            return _jaxprs.bind(eqn, [given.get(i, x) for i, x in enumerate(operands)])

        _, pullback = jax.vjp(call, [operands[i] for i in by])
        return pullback(cotangents)[0]

    types = [[v.aval for v in atoms] for atoms in (eqn.invars, eqn.outvars)]
    try:
        program = jax.make_jaxpr(pull_back)(*types)
    except Exception:  # A derivative may raise anything for a batch of any size.
        return [Mixed("a derivative")] * len(results)
    gradients = run(program, [*args, *results])
    if all(got in (args[i], Shared()) for got, i in zip(gradients, by)):
        return results
    return [Mixed("a derivative")] * len(results)


def _scan(eqn, args) -> list[Value]:
    consts, carry, xs = _jaxprs.split_scan(eqn, args)
    xs = [_slice(x) for x in xs]
    body = eqn.params["jaxpr"]
    carry, outs = _settle(lambda carry: run(body, [*consts, *carry, *xs]), carry)
    if symbolic_axes((eqn.params["length"],)):
        return [Mixed("scan")] * len(eqn.outvars)
    return [*carry, *map(_stacked, outs)]


def _slice(x: Value) -> Value:
    """A slice along the first axis."""
    if not isinstance(x, Rows):
        return x
    return x._replace(axis=x.axis - 1) if x.axis > 0 else Mixed("scan")


def _stacked(y: Value) -> Value:
    return y._replace(axis=y.axis + 1) if isinstance(y, Rows) else y


def _while(eqn, args) -> list[Value]:
    cond_consts, body_consts, carry = _jaxprs.split_while(eqn, args)
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    carry, _ = _settle(lambda carry: run(body, [*body_consts, *carry]), carry)
    (more,) = run(cond, [*cond_consts, *carry])
    # Whoever decides for all examples at once has to be the same for all.
    return carry if isinstance(more, Shared) else [_mixed(more, "while")] * len(carry)


def _settle(body: Callable, carry: list[Value]) -> tuple[list[Value], list[Value]]:
    """What a loop carries, at its first turn and at every later one."""
    while True:
        outs = body(carry)
        after = [_either(*pair) for pair in zip(carry, outs[: len(carry)])]
        if after == carry:
            return carry, outs[len(carry) :]
        carry = after


def _either(x: Value, y: Value) -> Value:
    """What holds for both of two values."""
    if x == y:
        return x
    kinds = {type(x), type(y)}
    if kinds == {Shared, PerStep}:
        return PerStep()
    return next((v for v in (x, y) if isinstance(v, Mixed)), Mixed("control flow"))


def _cond(eqn, args) -> list[Value]:
    index, *operands = args
    outs = [run(branch, operands) for branch in eqn.params["branches"]]
    if not isinstance(index, Shared):
        return [_mixed(index, "cond")] * len(eqn.outvars)
    return [functools.reduce(_either, column) for column in zip(*outs, strict=True)]


def _mixed(x: Value, by: str) -> Mixed:
    return x if isinstance(x, Mixed) else Mixed(by)


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}
