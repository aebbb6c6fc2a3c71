"""Runs a jaxpr on `Spread`s instead of arrays.

A value is either known, an ordinary array that does not depend on the input, or a
`Spread`. JAX itself evaluates a primitive whose operands are all known. Otherwise:

* a primitive that calls a program (`jit`, `checkpoint`) is run by this interpreter;
* control flow runs its program step by step, as often as it would run;
* any other primitive has a rule in `rules`. Without one, every output depends on
  every input step.
"""

import functools
from typing import Any

import jax.numpy as jnp

from tdjax import _jaxprs
from tdjax._influence.rules import RULES
from tdjax._influence.spread import (
    Spread,
    as_spreads,
    everything,
    same_everywhere,
    spread,
    stack,
    union,
)


def evaluate(jaxpr, consts, args, bound: float) -> list[Any]:
    """Runs `jaxpr` on known values and spreads."""
    run_equation = functools.partial(_evaluate_equation, bound=bound)
    return _jaxprs.evaluate(jaxpr, consts, args, run_equation)


def _evaluate_equation(eqn, args, bound: float) -> list[Any]:
    name = eqn.primitive.name
    if not any(isinstance(x, Spread) for x in args):
        return _jaxprs.bind(eqn, args)
    run = functools.partial(_run, bound=bound)
    calls = _jaxprs.CALLS_AND_CUSTOM_DERIVATIVES
    if calls.get(name) in eqn.params:
        return run(eqn.params[calls[name]], args)
    sign_varies = any(x.sign_varies for x in args if isinstance(x, Spread))
    if name in _CONTROL_FLOW:
        outs = _CONTROL_FLOW[name](eqn, args, run, bound)
    elif sign_varies and _reads_signs(eqn):
        return everything(eqn, args, bound)
    else:
        outs = RULES.get(name, everything)(eqn, args, bound)
    mark = lambda x: x._replace(sign_varies=x.sign_varies or sign_varies)
    return [mark(x) if isinstance(x, Spread) else x for x in outs]


def _reads_signs(eqn) -> bool:
    """Whether it may tell 0.0 from -0.0, which are equal, and stay finite (1 / 0)."""
    name, kinds = eqn.primitive.name, [v.aval.dtype for v in eqn.invars]
    if name not in RULES or name in _READS_SIGNS:
        return True
    if any(jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds):
        return name in _HAS_A_CUT
    # The function of a scatter or a pool.
    inner = [_jaxprs.open_program(program)[0] for program in _jaxprs.programs(eqn)]
    return any(_reads_signs(each) for program in inner for each in program.eqns)


_READS_SIGNS = frozenset(("atan2", "nextafter", "bitcast_convert_type"))
# Complex functions that have other values on the two sides of an axis.
_HAS_A_CUT = frozenset(
    ("acos", "acosh", "asin", "asinh", "atan", "atanh", "log", "log1p", "pow", "sqrt")
)


def _run(program, args, bound: float) -> list[Any]:
    """Runs a jaxpr, closed or without constants."""
    return evaluate(*_jaxprs.open_program(program), args, bound)


def _scan(eqn, args, run, bound) -> list[Any]:
    params = eqn.params
    consts, carry, xs = _jaxprs.split_scan(eqn, args)
    order = list(range(params["length"]))
    rows = {}
    for i in reversed(order) if params["reverse"] else order:
        slices = [x.take(i) if isinstance(x, Spread) else x[i] for x in xs]
        outs = run(params["jaxpr"], [*consts, *carry, *slices])
        carry, rows[i] = outs[: len(carry)], outs[len(carry) :]
    if not rows:
        return everything(eqn, args, bound)
    return [
        *carry,
        *(_stack(column, bound) for column in zip(*(rows[i] for i in order))),
    ]


def _stack(values, bound: float):
    if any(isinstance(x, Spread) for x in values):
        return stack(as_spreads(values, bound))
    return jnp.stack(values)  # NumPy can't hold random keys.


def _while(eqn, args, run, bound) -> list[Any]:
    cond_consts, body_consts, carry = _jaxprs.split_while(eqn, args)
    while True:
        (more,) = run(eqn.params["cond_jaxpr"], [*cond_consts, *carry])
        if isinstance(more, Spread):
            return everything(eqn, args, bound)
        if not more:
            return carry
        carry = run(eqn.params["body_jaxpr"], [*body_consts, *carry])


def _cond(eqn, args, run, bound) -> list[Any]:
    index, *operands = args
    branches = eqn.params["branches"]
    if not isinstance(index, Spread):
        return run(branches[int(index)], operands)
    outs = [run(branch, operands) for branch in branches]
    columns = zip(eqn.outvars, zip(*outs, strict=True), strict=True)
    return [_chosen(v.aval, index, column, bound) for v, column in columns]


def _chosen(aval, index: Spread, values, bound: float) -> Spread:
    """One of several values, and which of them depends on the input."""
    *spreads, _ = as_spreads([*values, index], bound)
    out = union(spreads)
    steps = out.steps | same_everywhere(index.steps, aval.shape)
    return spread(aval.dtype, steps, out.low, out.high, True, bound)


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}
