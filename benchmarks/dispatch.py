"""What calls cost in Python: of an NNX layer, and of tracing layers with a table."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import tdjax
from benchmarks.targets import FIXED, TABLE

LAYERS = 20


def calls() -> dict[str, Callable[[], Any]]:
    """A layer so small that only the call is timed; the first is without time."""
    layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    wrapped = tdjax.nnx.TimeDistributed(layer)
    mapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 1), out_axes=1)
    jitted = nnx.jit(lambda model, x: model(x))
    jitted_vmap = nnx.jit(mapped)
    graphdef, state = nnx.split(wrapped)
    pure = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = jnp.ones((2, 4, 16))
    ready = jax.block_until_ready
    return {
        "nnx.jit, the layer alone": lambda: ready(jitted(layer, x)),
        "nnx.jit, tdjax.nnx": lambda: ready(jitted(wrapped, x)),
        "nnx.jit, nnx.vmap": lambda: ready(jitted_vmap(layer, x)),
        "jax.jit after nnx.split, tdjax.nnx": lambda: ready(pure(state, x)),
        "no jit, tdjax.nnx": lambda: ready(wrapped(x)),
        "no jit, nnx.vmap": lambda: ready(mapped(layer, x)),
    }


class _Layers(nn.Module):
    """Layers that differ in their sizes, so that each is another place."""

    options: Any

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            layer = nn.Dense(16 + i)
            x = tdjax.linen.TimeDistributed(layer, **self.options)(x)
        return x


def traces() -> dict[str, Callable[[], Any]]:
    """Tracing with fixed options, and with options that are looked up."""
    x = jnp.ones((2, 8, 16))
    fixed, auto = _Layers({"method": "vmap"}), _Layers({"method": "auto"})
    variables = fixed.init(jax.random.key(0), x)
    # With no other candidate, "vmap" is what the table has.
    found = tdjax.linen.autotune(auto, variables, x, budget=60.0, candidates=[])

    def trace(model):
        # A function that is new, or JAX would remember the program.
        return jax.make_jaxpr(lambda variables, x: model.apply(variables, x))

    def look_up():
        with found:
            return trace(auto)(variables, x)

    return {FIXED: lambda: trace(fixed)(variables, x), TABLE: look_up}
