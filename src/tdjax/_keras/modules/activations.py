"""Keras' activation functions in JAX, with Keras' defaults and argument names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


def linear(x):
    return x


def relu(x, negative_slope=0.0, max_value=None, threshold=0.0):
    """Zero (or a slope) up to `threshold`, then `x` itself, at most `max_value`."""
    above = jnp.where(x > threshold, x, 0) if threshold else jax.nn.relu(x)
    if max_value is not None:
        above = jnp.clip(above, 0, max_value)
    if not negative_slope:
        return above
    return above - negative_slope * jax.nn.relu(threshold - x)


def leaky_relu(x, negative_slope=0.2):
    return jax.nn.leaky_relu(x, negative_slope)


def gelu(x, approximate=False):
    return jax.nn.gelu(x, approximate)


def squareplus(x, b=4):
    return jax.nn.squareplus(x, b)


def mish(x):
    return x * jnp.tanh(jax.nn.softplus(x))


def tanh_shrink(x):
    return x - jnp.tanh(x)


def soft_shrink(x, threshold=0.5):
    below = jnp.where(x < -threshold, x + threshold, 0)
    return jnp.where(x > threshold, x - threshold, below)


def hard_shrink(x, threshold=0.5):
    return jnp.where(jnp.abs(x) > threshold, x, 0)


def threshold(x, threshold, default_value):
    return jnp.where(x > threshold, x, default_value)


# Without sparsemax: that of Keras (3.15) has outputs which don't sum to one.
_OF_JAX = """
    celu elu glu hard_sigmoid hard_silu hard_tanh log_sigmoid log_softmax relu6 selu
    sigmoid silu softmax softplus sparse_plus sparse_sigmoid
"""
_OWN = (gelu, hard_shrink, leaky_relu, linear, mish, relu, soft_shrink, squareplus)
FUNCTIONS = {
    **{name: getattr(jax.nn, name) for name in _OF_JAX.split()},
    **{function.__name__: function for function in (*_OWN, tanh_shrink, threshold)},
    "exponential": jnp.exp,
    "softsign": jax.nn.soft_sign,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """A function of the table by its name: those of `jax.nn` can't all be pickled."""

    name: str

    def __call__(self, x, *args, **kwargs):
        return FUNCTIONS[self.name](x, *args, **kwargs)


# Where `keras.ops` differs in a name or a default.
OPERATIONS = {
    "exp": Activation("exponential"),
    "gelu": functools.partial(Activation("gelu"), approximate=True),
}
