"""The kernel of a softmax head in either layout, and the products with it."""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import at_least_float32

Params = dict[str, Any]
AXIS_OF_WORDS = {"kernel": 1, "embedding": 0, "bias": 0, "class_weights": 0}


def weight_name(params: Params) -> str:
    """The key of the kernel: (features, words), or of (words, features)."""
    return "kernel" if "kernel" in params else "embedding"


def times_kernel(hidden, params: Params):
    """`(rows, features)` -> `(rows, words)`, summed in float32 or wider."""
    wide = at_least_float32(hidden.dtype)
    if "kernel" in params:
        return jnp.matmul(hidden, params["kernel"], preferred_element_type=wide)
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        hidden, params["embedding"], contract, preferred_element_type=wide
    )


def times_transposed_kernel(d_logits, params: Params, wide):
    """`(rows, words)` -> `(rows, features)`."""
    if "embedding" in params:
        return jnp.matmul(d_logits, params["embedding"], preferred_element_type=wide)
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        d_logits, params["kernel"], contract, preferred_element_type=wide
    )


def is_half(params: Params) -> bool:
    """Whether the kernel is narrower than float32."""
    return jnp.finfo(params[weight_name(params)].dtype).bits < 32


def in_both_layouts(params: Params) -> Params:
    """With the kernel and its transpose: as a loop's carry, XLA keeps both."""
    transposed = {"kernel": "embedding", "embedding": "kernel"}
    return {**params, **{transposed[n]: x.T for n, x in params.items() if n != "bias"}}
