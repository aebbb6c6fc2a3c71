"""What one call of an NNX layer costs in Python, in each way to call it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import tdjax


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
