"""Initial values by name: Flax's own initializers can't be pickled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Initializer:
    """One of `jax.nn.initializers` by its name, with keyword arguments as pairs."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, key, shape, dtype=jnp.float32, out_sharding=None):
        make = getattr(jax.nn.initializers, self.name)
        return make(**dict(self.options))(key, shape, dtype)


# What Keras' layers start from unless told otherwise.
glorot_uniform = Initializer("glorot_uniform")
orthogonal = Initializer("orthogonal")
# Flax's for embeddings; JAX has none that is uniform around zero.
embedding = Initializer("normal", (("stddev", 0.05),))
