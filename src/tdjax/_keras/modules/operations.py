"""The operations between layers, such as `x + y`, as Flax modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tdjax._keras.modules import stateless
from tdjax._keras.modules.activations import FUNCTIONS, OPERATIONS


def get_item(x, key):
    return x[tuple(key) if isinstance(key, list) else key]


def cast(x, dtype):
    return x.astype(dtype)


OWN = {"cast": cast, "get_item": get_item, "stop_gradient": jax.lax.stop_gradient}


def find_function(name: str) -> Any:
    """The function of that name: an operation, an activation, or one of `jax.numpy`."""
    for table in (OWN, stateless.FUNCTIONS, OPERATIONS, FUNCTIONS):
        if name in table:
            return table[name]
    return getattr(jnp, name, None)


class Operation(nn.Module):
    """A function of arrays by its name, with its keyword arguments as pairs."""

    function: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args, **kwargs):
        return find_function(self.function)(*args, **kwargs, **dict(self.options))
