"""Runs a jaxpr one equation at a time, with a rule for each.

A jaxpr goes in with a value for each of its inputs, and the values of its outputs come
out. `env` maps the variables to the values that are known so far.
"""

from collections.abc import Callable
from typing import Any

# Primitives that only call a program, and the parameter that holds it. (Not shard_map:
# its program sees other shapes.)
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
# With those that call a program whose derivative is given.
CALLS_AND_CUSTOM_DERIVATIVES = CALLS | {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def evaluate(jaxpr, consts, args, run_equation: Callable) -> list[Any]:
    """Runs `jaxpr`, each equation by `run_equation(eqn, args) -> results`."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    evaluate_equations(jaxpr.eqns, env, run_equation)
    return read(env, jaxpr.outvars)


def evaluate_equations(eqns, env: dict, run_equation: Callable | None = None) -> None:
    """Runs equations in their order, on the values in `env`, and adds the results."""
    for eqn in eqns:
        with eqn.ctx.manager:
            outs = (run_equation or bind)(eqn, read(env, eqn.invars))
        env.update(zip(eqn.outvars, outs, strict=True))


def read(env: dict, atoms) -> list[Any]:
    """The values of variables and literals."""
    return [atom.val if is_literal(atom) else env[atom] for atom in atoms]


def is_literal(atom) -> bool:
    return hasattr(atom, "val")


def bind(eqn, args) -> list[Any]:
    """Lets JAX evaluate one equation."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before JAX 0.10 the functions among the parameters came separately.
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    outs = eqn.primitive.bind(*subfuns, *args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def open_program(program) -> tuple[Any, Any]:
    """`(jaxpr, constants)` of a jaxpr, closed or without constants."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())
