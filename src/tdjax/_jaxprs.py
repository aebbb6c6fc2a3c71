"""Running a jaxpr one equation at a time, with a rule for each."""

from collections.abc import Callable
from typing import Any


def evaluate(jaxpr, consts, args, run_equation: Callable) -> list[Any]:
    """Runs `jaxpr`, each equation by `run_equation(eqn, args) -> results`."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if hasattr(v, "val") else env[v]
    for eqn in jaxpr.eqns:
        outs = run_equation(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def bind(eqn, args) -> list[Any]:
    """Lets JAX evaluate one equation."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before JAX 0.10 it returned the functions among the parameters separately.
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    outs = eqn.primitive.bind(*subfuns, *args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def open_program(program) -> tuple[Any, Any]:
    """`(jaxpr, constants)` of a jaxpr, closed or without constants."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())
