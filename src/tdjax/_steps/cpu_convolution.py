"""Convolutions that stay fast inside a compiled loop on CPU.

XLA's fast convolution on a CPU needs images in the order `(batch, space, features)` and
kernels in the order `(space, in, out)`. XLA transposes other orders into these, but not
inside a loop (jax-ml/jax issue 12868). There it falls back to code that is 10 to 20
times slower. The gradients that JAX makes of a convolution always have such an order,
even if the convolution itself has not. So the transposes are written out here.

A function of one pytree goes in. Its program is traced and run equation by equation
(`_run`), with each convolution replaced by `_convolve`, which transposes its operands,
convolves in the fast order, and has derivatives that do the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from tdjax._jaxprs import CALLS, bind, evaluate, open_program


def with_transposed_convolutions(fun):
    """`fun`, a function of one pytree, with the same results and faster gradients.

    On other platforms than a CPU it runs as it is. So do everywhere: grouped
    convolutions, and those inside of `fun`'s own loops, branches and functions with
    custom derivatives.
    """

    @functools.wraps(fun)
    def rewritten(args):
        program, shapes = jax.make_jaxpr(fun, return_shape=True)(args)
        # `fun` is not called again: it may make modules, as Haiku's functions do.
        results = _run_by_platform(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


def _run_by_platform(program, args) -> list[Any]:
    """The program, rewritten where it is compiled for a CPU."""
    as_it_is = lambda *args: evaluate(*open_program(program), args, bind)
    if not _has_convolution(open_program(program)[0]):
        return as_it_is(*args)
    rewritten = lambda *args: _run(program, args)
    return jax.lax.platform_dependent(*args, cpu=rewritten, default=as_it_is)


def _has_convolution(jaxpr) -> bool:
    return any(
        _is_convolution(eqn) or any(map(_has_convolution, _programs(eqn)))
        for eqn in jaxpr.eqns
    )


def _is_convolution(eqn) -> bool:
    return (
        eqn.primitive.name == "conv_general_dilated"
        and eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1
        and all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars)
    )


def _programs(eqn) -> list[Any]:
    program = eqn.params.get(CALLS.get(eqn.primitive.name))
    return [] if program is None else [open_program(program)[0]]


def _run(program, args) -> list[Any]:
    return evaluate(*open_program(program), args, _run_equation)


def _run_equation(eqn, args) -> list[Any]:
    if _is_convolution(eqn):
        return [_convolve(eqn.params, *args)]
    if not any(map(_has_convolution, _programs(eqn))):
        return bind(eqn, args)
    run = functools.partial(_run, eqn.params[CALLS[eqn.primitive.name]])
    if "policy" in eqn.params:
        options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        run = jax.checkpoint(run, **options)
    return run(args)


def _convolve(params, x, kernel):
    """The convolution of `params`, computed in the order that is fast."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    numbers = ("precision", "preferred_element_type")
    options = {name: params[name] for name in (*names, *numbers)}
    # Specs hold the positions of (batch, features, *space) and (out, in, *space).
    x = jnp.transpose(x, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    kernel = jnp.transpose(kernel, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    y = _channels_last(options, x, kernel)
    order = (out_spec[0], *out_spec[2:], out_spec[1])
    return jnp.transpose(y, sorted(range(y.ndim), key=order.__getitem__))


def _channels_last(options, x, kernel):
    """A convolution whose gradients are in the fast order too.

    Reverse mode transposes the tangent that is written here. So the tangent has its
    kernel in the order `(space, out, in)`, which the transpose turns into the fast one;
    the tangent of the kernel does likewise.
    """
    rank = x.ndim
    space = tuple(range(1, rank - 1))
    front = tuple(range(rank - 2))
    last, before = rank - 1, rank - 2
    image, taps = (0, last, *space), (last, before, *front)
    convolve = lambda a, b, *specs: lax.conv_general_dilated(
        a, b, **options, dimension_numbers=lax.ConvDimensionNumbers(*specs)
    )

    @jax.custom_jvp
    def apply(x, kernel):
        return convolve(x, kernel, image, taps, image)

    def jvp(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        y = apply(x, kernel)
        dy = jnp.zeros_like(y)
        # XLA would compute a convolution of zeros: leave it out.
        if not isinstance(dx, SymbolicZero):
            swapped = jnp.swapaxes(kernel, before, last)
            dy += convolve(dx, swapped, image, (before, last, *front), image)
        if not isinstance(dkernel, SymbolicZero):
            turned = jnp.swapaxes(x, 0, last), jnp.moveaxis(dkernel, before, 0)
            specs = (last, 0, *space), (last, 0, *space), (before, last, *front)
            dy += jnp.moveaxis(convolve(*turned, *specs), before, 0)
        return y, dy

    apply.defjvp(jvp, symbolic_zeros=True)
    return apply(x, kernel)
