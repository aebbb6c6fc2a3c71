"""Initial values by name: Flax's own initializers are closures, which can't be pickled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Initializer:
    """One of `jax.nn.initializers` by its name, with its options.

    Attributes:
      name: the function of `jax.nn.initializers` that makes the initializer.
      options: its keyword arguments, as pairs.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, key, shape, dtype=jnp.float32, out_sharding=None):
        make = getattr(jax.nn.initializers, self.name)
        return make(**dict(self.options))(key, shape, dtype)


# What a Keras layer has unless told otherwise.
glorot_uniform = Initializer("glorot_uniform")
orthogonal = Initializer("orthogonal")
uniform = Initializer("uniform", (("scale", 0.05),))
