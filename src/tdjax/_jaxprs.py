"""Runs a jaxpr one equation at a time, with a rule for each.

A jaxpr goes in with a value for each of its inputs, and the values of its outputs come
out. `env` maps the variables to the values that are known so far.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

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
# Primitives that work on each element alone. A scalar operand goes with every element.
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    conj convert_element_type cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p log2 logistic lt
    max min mul ne neg nextafter not one_minus_square or pow real reduce_precision rem
    round rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sinh
    sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# Primitives that return their operands; `name` is that of `checkpoint_name`.
IDENTITIES = frozenset(
    ("copy", "name", "optimization_barrier", "sharding_constraint", "stop_gradient")
)


def evaluate(jaxpr, consts, args, run_equation: Callable) -> list[Any]:
    """Runs `jaxpr`, each equation by `run_equation(eqn, args) -> results`."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    evaluate_equations(jaxpr.eqns, env, run_equation)
    return read(env, jaxpr.outvars)


def evaluate_equations(eqns, env: dict, run_equation: Callable | None = None) -> None:
    """Runs equations in their order, on the values in `env`, and adds the results."""
    for eqn in eqns:
        # Profiles show operations by the names of layers.
        with eqn.ctx.manager, _named(eqn):
            outs = (run_equation or bind)(eqn, read(env, eqn.invars))
        env.update(zip(eqn.outvars, outs, strict=True))


def _named(eqn) -> Any:
    """The scope with the name under which an equation was traced."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


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


def split_scan(eqn, args) -> tuple[list, list, list]:
    """The operands of a `scan`: constants, what it carries, and what it runs over.

    JAX versions name these parameters differently, so ranks decide: the last has one
    more axis outside of the loop than inside.
    """
    body = eqn.params["jaxpr"].jaxpr
    same_rank = lambda out, inn: len(out.aval.shape) == len(inn.aval.shape)
    carried = sum(map(same_rank, eqn.outvars, body.outvars))
    scanned = sum(not same_rank(*pair) for pair in zip(eqn.invars, body.invars))
    first, last = len(args) - scanned - carried, len(args) - scanned
    return args[:first], args[first:last], args[last:]


def split_while(eqn, args) -> tuple[list, list, list]:
    """The operands of a `while`: the constants of its two programs, and the carry."""
    carried = len(eqn.outvars)
    first = len(eqn.params["cond_jaxpr"].jaxpr.invars) - carried
    last = first + len(eqn.params["body_jaxpr"].jaxpr.invars) - carried
    return args[:first], args[first:last], args[last:]


def has_references(program) -> bool:
    """Whether it or a program inside writes to arrays (`jax.new_ref`)."""
    jaxpr, _ = open_program(program)
    results = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    variables = [*jaxpr.constvars, *jaxpr.invars, *results]
    if any(type(v.aval).__name__ == "AbstractRef" for v in variables):
        return True
    return any(has_references(inner) for eqn in jaxpr.eqns for inner in programs(eqn))


def contains(program, primitive: str) -> bool:
    """Whether it or a program inside has an operation of this name."""
    eqns = open_program(program)[0].eqns
    return any(
        eqn.primitive.name == primitive
        or any(contains(inner, primitive) for inner in programs(eqn))
        for eqn in eqns
    )


def constants(program) -> list[Any]:
    """The arrays that it and the programs inside of it close over."""
    jaxpr, consts = open_program(program)
    inner = [inner for eqn in jaxpr.eqns for inner in programs(eqn)]
    return [*consts, *(x for each in inner for x in constants(each))]


def programs(eqn) -> list:
    """The programs among an equation's parameters, and in tuples and lists of them."""
    return _programs_in(list(eqn.params.values()))


def _programs_in(value: Any) -> list:
    if isinstance(value, tuple | list):
        return [program for item in value for program in _programs_in(item)]
    return [value] if hasattr(open_program(value)[0], "eqns") else []


def open_program(program) -> tuple[Any, Any]:
    """`(jaxpr, constants)` of a jaxpr, closed or without constants."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())
