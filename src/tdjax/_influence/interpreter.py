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
import numpy as np

from tdjax import _jaxprs
from tdjax._influence.rules import RULES
from tdjax._influence.spread import (
    Spread,
    any_far,
    as_spreads,
    everything,
    same_everywhere,
    spread,
    stack,
    union,
    unknown,
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
    elif sign_varies and (name in _READS_SIGNS or name not in RULES):
        return _from_every_step(eqn, args, bound)
    else:
        outs = RULES.get(name, everything)(eqn, args, bound)
    mark = lambda x: x._replace(sign_varies=x.sign_varies or sign_varies)
    return [mark(x) if isinstance(x, Spread) else x for x in outs]


# 0.0 and -0.0 are equal numbers, and only these tell them apart.
_READS_SIGNS = frozenset(("atan2", "nextafter", "bitcast_convert_type"))


def _from_every_step(eqn, args, bound: float) -> list[Any]:
    """What reads the sign of a zero, whose steps are not known any more."""
    timesteps = next(len(x.steps) for x in args if isinstance(x, Spread))
    far = any_far(as_spreads(args, bound), bound)
    outs = [v.aval for v in eqn.outvars]
    steps = lambda v: np.ones((timesteps, *v.shape), bool)
    return [unknown(v.dtype, steps(v), far, bound) for v in outs]


def _run(program, args, bound: float) -> list[Any]:
    """Runs a jaxpr, closed or without constants."""
    return evaluate(*_jaxprs.open_program(program), args, bound)


def _scan(eqn, args, run, bound) -> list[Any]:
    params = eqn.params
    split = _scan_parts(eqn)
    consts, carry, xs = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
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


def _scan_parts(eqn) -> tuple[int, int]:
    """Where the carry and the scanned operands start.

    JAX versions name these parameters differently, so ranks decide: a scanned operand
    has one more axis outside the loop than inside.
    """
    body = eqn.params["jaxpr"].jaxpr
    same_rank = lambda out, inn: len(out.aval.shape) == len(inn.aval.shape)
    carried = sum(map(same_rank, eqn.outvars, body.outvars))
    scanned = sum(not same_rank(*pair) for pair in zip(eqn.invars, body.invars))
    total = len(eqn.invars)
    return total - scanned - carried, total - scanned


def _stack(values, bound: float):
    if any(isinstance(x, Spread) for x in values):
        return stack(as_spreads(values, bound))
    return jnp.stack(values)  # NumPy can't hold random keys.


def _while(eqn, args, run, bound) -> list[Any]:
    params = eqn.params
    carried = len(eqn.outvars)
    first = len(params["cond_jaxpr"].jaxpr.invars) - carried
    split = first, first + len(params["body_jaxpr"].jaxpr.invars) - carried
    cond_consts, body_consts = args[: split[0]], args[split[0] : split[1]]
    carry = args[split[1] :]
    while True:
        (more,) = run(params["cond_jaxpr"], [*cond_consts, *carry])
        if isinstance(more, Spread):
            return everything(eqn, args, bound)
        if not more:
            return carry
        carry = run(params["body_jaxpr"], [*body_consts, *carry])


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
