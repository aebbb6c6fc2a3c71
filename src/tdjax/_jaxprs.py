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


def has_references(program) -> bool:
    """Whether it or a program inside writes to arrays (`jax.new_ref`)."""
    jaxpr, _ = open_program(program)
    results = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    variables = [*jaxpr.constvars, *jaxpr.invars, *results]
    if any(type(v.aval).__name__ == "AbstractRef" for v in variables):
        return True
    parameters = [value for eqn in jaxpr.eqns for value in eqn.params.values()]
    return any(map(has_references, _programs(parameters)))


def _programs(value: Any) -> list:
    """The programs in a parameter, or in a tuple or list of such."""
    if isinstance(value, tuple | list):
        return [program for item in value for program in _programs(item)]
    return [value] if hasattr(open_program(value)[0], "eqns") else []


def map_constants(program, change: Callable) -> Any:
    """A program with `change(constant)` for each array that it or an inner one holds.

    These are the arrays that functions close over.
    """
    jaxpr, consts = open_program(program)
    inner = lambda value: _map_in_parameter(value, change)
    eqns = [
        eqn.replace(params={name: inner(value) for name, value in eqn.params.items()})
        for eqn in jaxpr.eqns
    ]
    jaxpr = jaxpr.replace(eqns=eqns)
    if not hasattr(program, "consts"):
        return jaxpr
    return program.replace(jaxpr=jaxpr, consts=list(map(change, consts)))


def _map_in_parameter(value: Any, change: Callable) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_map_in_parameter(item, change) for item in value)
    is_program = hasattr(open_program(value)[0], "eqns")
    return map_constants(value, change) if is_program else value


def open_program(program) -> tuple[Any, Any]:
    """`(jaxpr, constants)` of a jaxpr, closed or without constants."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())
