"""Shows from a program that it treats the examples of a batch alike and alone.

Only then does `method="fold"` give what the definition gives, whatever the numbers are:
that they agree for some numbers shows little where a parameter is zero, say.

The function is traced for a batch of any size, `n` (as `jax.export` does). Then the
examples are along the one axis whose size depends on `n`, and `batch_rules` says for
each operation whether it works along this axis example by example. A function that does
not work for any `n`, or computes with its value, is not shown to be right. It may also
do one thing for `n` and another for a number. So it is traced for some numbers too: for
a large one the program must keep examples apart, and the others must be the same.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tdjax import _jaxprs
from tdjax._steps import places
from tdjax._steps.axes import PER_STEP, PER_STEP_OR_BATCH, Axis, map_results
from tdjax._tuning.batch_rules import SHAPES, apply_rule
from tdjax._tuning.batch_values import (
    LARGE_PRIME,
    Mixed,
    PerStep,
    Rows,
    Shared,
    Value,
    any_number,
    axes_of_examples,
)


def find_mixing(
    call: Callable, arrays: list, axes: list, out_axes: Any, batch: int
) -> str | None:
    """What in a folded `call(arrays)` may mix examples; None if nothing does.

    `axes` and `out_axes` are the time axes that the arrays and the results had, and
    `batch` is the number of examples of one step.
    """

    def trace(size) -> tuple[Any, list[Axis]]:
        """The program for so many examples, and the axes of its results."""
        axes_of_results: list[Axis] = []

        def leaves_of(arrays):
            results = call(arrays)
            note = lambda y, axis: axes_of_results.append(axis)
            map_results(note, results, out_axes)
            return jax.tree.leaves(results)

        # A place inside has other sizes here. If it folds, it is proved by itself.
        with places.in_effect(None):
            program = jax.make_jaxpr(leaves_of)(_of_size(size, arrays, axes))
        return program, axes_of_results

    examples = next(len(x) for x, axis in zip(arrays, axes) if axis is not PER_STEP)
    sizes = {examples, batch, examples + 1, examples + 2} - {1}  # JAX treats 1 apart.
    try:
        of_any_size, of_large_size = trace(any_number()), trace(LARGE_PRIME)
        outline = _outline(*of_large_size, LARGE_PRIME)
        is_alike = all(_outline(*trace(size), size) == outline for size in sizes)
    except Exception:  # `fun` may raise anything for such a batch.
        return "its size"
    if _jaxprs.has_references(of_any_size[0]):
        return "a reference"
    reason = _first_reason(*of_any_size, axes) or _first_reason(*of_large_size, axes)
    return reason or (None if is_alike else "its size")


def _first_reason(program, out_axes: list[Axis], axes: list[Axis]) -> str | None:
    values: list[Value] = [PerStep() if axis is PER_STEP else Rows(0) for axis in axes]
    results = _run(program, values)
    reasons = [_reason(*pair) for pair in zip(results, out_axes, strict=True)]
    return next(filter(None, reasons), None)


def _of_size(size: Any, arrays: list, axes: list) -> list:
    """The types of the arrays for a batch of another size."""

    def resize(x, axis: Axis):
        if axis is PER_STEP:
            return x
        weak_type = jax.typeof(x).weak_type
        shape = (size, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, weak_type=weak_type)

    return list(map(resize, arrays, axes))


# What an operation's options are compared by. (Its arrays are operands, its functions
# are programs or make them.)
_FACTS = int | float | complex | str | enum.Enum | np.dtype | np.generic


def _outline(program, out_axes: list[Axis], examples: int) -> list[Any]:
    """What a program for so many examples does, and the axes of its results.

    It is equal to that for another number if both do the same.
    """
    return [*_operations(program, examples, derivatives=True), out_axes]


def _operations(program, examples: int, derivatives: bool) -> list[Any]:
    """Constants, then each operation: on what, with what options, of what types.

    Given derivatives are among them, but not their own: the first only counts, and it
    may call its function again.
    """
    jaxpr, consts = _jaxprs.open_program(program)
    places: dict[Any, Any] = {
        v: i for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars])
    }
    lines: list[Any] = list(map(_Number, consts))
    read = lambda v: _Number(v.val) if _jaxprs.is_literal(v) else places[v]
    for eqn in jaxpr.eqns:
        options = {k: v for k, v in eqn.params.items() if k not in SHAPES}
        facts = [x for x in jax.tree.leaves(options) if isinstance(x, _FACTS)]
        inner = [_operations(p, examples, derivatives) for p in _jaxprs.programs(eqn)]
        given = _derivatives(eqn) if derivatives else []
        inner += [_operations(p, examples, derivatives=False) for p in given]
        types = [_Type(v.aval, examples) for v in eqn.outvars]
        operands = list(map(read, eqn.invars))
        lines.append((eqn.primitive.name, operands, facts, types, inner))
        places.update((v, (len(lines), i)) for i, v in enumerate(eqn.outvars))
    return [*lines, list(map(read, jaxpr.outvars))]


class _Type:
    """A dtype and a shape, in a program for so many examples."""

    def __init__(self, aval: Any, examples: int):
        self.shape, self.dtype = getattr(aval, "shape", ()), str(aval.dtype)
        self.examples = examples

    def __eq__(self, other):
        if not isinstance(other, _Type) or self.dtype != other.dtype:
            return False
        if len(self.shape) != len(other.shape):
            return False
        numbers = self.examples, other.examples
        pairs = zip(self.shape, other.shape)
        return all(_is_same_size(*pair, *numbers) for pair in pairs)


def _is_same_size(x: int, y: int, examples: int, other_examples: int) -> bool:
    """Whether two sizes are equal, or the same number for each example."""
    if x == y:
        return True
    if x % examples or y % other_examples:
        return False
    return x // examples == y // other_examples


class _Number:
    """A constant, compared by its value; one that is being traced is only itself."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other):
        if not isinstance(other, _Number):
            return False
        pair = self.value, other.value
        if pair[0] is pair[1]:
            return True
        if any(isinstance(x, Tracer) for x in pair):
            return False
        if str(jax.typeof(pair[0])) != str(jax.typeof(pair[1])):
            return False
        first, second = (np.asarray(_without_key_type(x)) for x in pair)
        return first.tobytes() == second.tobytes()


def _without_key_type(x: Any) -> Any:
    is_key = jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def _reason(result: Value, axis: Axis) -> str | None:
    """Why a result can't be split into the steps' results."""
    if isinstance(result, Mixed):
        return result.by
    if isinstance(result, PerStep):
        return "random keys"
    if isinstance(result, Rows):
        has_place = isinstance(axis, int) or axis is PER_STEP_OR_BATCH
        return None if has_place and result == Rows(0) else "its layout"
    return "a result without a batch axis" if isinstance(axis, int) else None


def _run(program, values: list[Value], derivatives: bool = True) -> list[Value]:
    """Runs a jaxpr, closed or without constants; looks at given derivatives, or not."""
    jaxpr, consts = _jaxprs.open_program(program)
    consts = [Shared()] * (len(consts) or len(jaxpr.constvars))
    run_equation = functools.partial(_evaluate_equation, derivatives=derivatives)
    results = _jaxprs.evaluate(jaxpr, consts, values, run_equation)
    return list(map(_or_shared, results))


def _or_shared(x: Any) -> Value:
    """A literal is a scalar that all share."""
    return x if isinstance(x, Value) else Shared()


def _evaluate_equation(eqn, args, derivatives: bool) -> list[Value]:
    name = eqn.primitive.name
    run = functools.partial(_run, derivatives=derivatives)
    args = list(map(_or_shared, args))
    calls = _jaxprs.CALLS_AND_CUSTOM_DERIVATIVES
    if calls.get(name) in eqn.params:
        results = run(eqn.params[calls[name]], args)
        is_given = derivatives and name not in _jaxprs.CALLS
        return _with_derivative(eqn, args, results) if is_given else results
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, args, run)
    # The function of a scatter, a pool or a reduction may use nothing but its operands.
    for inner in _jaxprs.programs(eqn):
        shared: list[Value] = [Shared()] * len(_jaxprs.open_program(inner)[0].invars)
        if any(result != Shared() for result in run(inner, shared)):
            return [Mixed(name)] * len(eqn.outvars)
    return apply_rule(eqn, args)


def _with_derivative(eqn, args, results: list[Value]) -> list[Value]:
    """The results, unless the derivative that somebody gave for them may mix.

    JAX's own derivatives of what keeps examples apart do so too.
    """
    if not any(isinstance(x, Rows) for x in [*args, *results]):
        return results
    refused: list[Value] = [Mixed("a derivative")] * len(results)
    operands = [args[i] for i in _differentiable(eqn)]
    if eqn.primitive.name == "custom_jvp_call":
        given, expected = operands, [*results, *results]
    elif all(isinstance(x, Rows) for x in operands):
        # The gradient by what examples share comes from all of them.
        given = [x if isinstance(x, Rows) else refused[0] for x in results]
        expected = [*results, *operands]
    else:  # A gradient by what examples share should be a sum: it may be a mean.
        return refused
    try:
        (program,) = _derivatives(eqn)
    except Exception:  # A derivative may raise anything for a batch of any size.
        return refused
    # It holds the function itself again, whose second derivative nobody asks for.
    got = _run(program, [*args, *given], derivatives=False)
    pairs = zip(got, expected, strict=True)
    return results if all(x in (want, Shared()) for x, want in pairs) else refused


def _differentiable(eqn) -> list[int]:
    """The places of the operands that a derivative can be taken by.

    Not by literals, nor by arrays that the function closes over, which come first.
    """
    is_float = lambda v: jnp.issubdtype(v.aval.dtype, jnp.inexact)
    closed_over = eqn.params.get("num_consts", 0)
    return [
        place
        for place, v in enumerate(eqn.invars)
        if place >= closed_over and is_float(v) and not _jaxprs.is_literal(v)
    ]


def _derivatives(eqn) -> list:
    """The program of the derivative that is given for a call, with the call itself.

    `custom_jvp`: of operands and tangents. `custom_vjp`: of operands and cotangents.
    """
    by = _differentiable(eqn)

    def call(operands, primals):
        given = dict(zip(by, primals))
        return _jaxprs.bind(eqn, [given.get(i, x) for i, x in enumerate(operands)])

    def push_forward(operands, tangents):
        primals = [operands[i] for i in by]
        return jax.jvp(functools.partial(call, operands), (primals,), (tangents,))

    def pull_back(operands, cotangents):
        primals = [operands[i] for i in by]
        y, pullback = jax.vjp(functools.partial(call, operands), primals)
        return y, pullback(cotangents)[0]

    types = [v.aval for v in eqn.invars]
    if eqn.primitive.name == "custom_jvp_call":
        return [jax.make_jaxpr(push_forward)(types, [types[i] for i in by])]
    if eqn.primitive.name == "custom_vjp_call":
        return [jax.make_jaxpr(pull_back)(types, [v.aval for v in eqn.outvars])]
    return []


def _scan(eqn, args, run) -> list[Value]:
    consts, carry, xs = _jaxprs.split_scan(eqn, args)
    xs = [_slice(x) for x in xs]
    body = eqn.params["jaxpr"]
    carry, outs = _settle(lambda carry: run(body, [*consts, *carry, *xs]), carry)
    if axes_of_examples((eqn.params["length"],)):
        return [Mixed("scan")] * len(eqn.outvars)
    return [*carry, *map(_stacked, outs)]


def _slice(x: Value) -> Value:
    """A slice along the first axis."""
    if not isinstance(x, Rows):
        return x
    return x.on(x.axis - 1) if x.axis > 0 else Mixed("scan")


def _stacked(y: Value) -> Value:
    return y.on(y.axis + 1) if isinstance(y, Rows) else y


def _while(eqn, args, run) -> list[Value]:
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


def _cond(eqn, args, run) -> list[Value]:
    index, *operands = args
    outs = [run(branch, operands) for branch in eqn.params["branches"]]
    if not isinstance(index, Shared):
        return [_mixed(index, "cond")] * len(eqn.outvars)
    return [functools.reduce(_either, column) for column in zip(*outs, strict=True)]


def _mixed(x: Value, by: str) -> Mixed:
    return x if isinstance(x, Mixed) else Mixed(by)


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}
