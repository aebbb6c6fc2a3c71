"""Random programs on arrays `(1, T, F)`: some operations mix the steps, some don't."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

T, F = 4, 2
FIRST_HALF = (jnp.arange(T) < T // 2)[None, :, None]


def scan(x):
    body = lambda carry, a: (carry * 0.5 + a, carry)
    return lax.scan(body, x[:, 0], jnp.swapaxes(x, 0, 1))[1].swapaxes(0, 1)


def cond(x):
    return lax.cond(x[0, 0, 0] > 0, lambda a: a, lambda a: a[:, ::-1], x)


def count_up(x):
    """A loop whose number of rounds depends on the input."""
    run = lambda state: (state[0] + 1, state[1] / 2)
    limit = jnp.minimum(x[0, 1, 0], 3)
    return lax.while_loop(lambda state: state[0] < limit, run, (0.0, x))[1]


def where_true(test, x):
    """Shows whether a comparison may be true: another step is read then."""
    return jnp.where(test, x[:, ::-1], 0)


ONE = {
    "sin": jnp.sin, "exp": jnp.exp, "abs": jnp.abs, "floor": jnp.floor,
    "tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "sqrt": jnp.sqrt,
    "log": lambda x: jnp.log(x * x + 1), "sign": jnp.sign, "negative": jnp.negative,
    "twice": lambda x: x * 2, "times 0": lambda x: x * 0, "a third": lambda x: x / 3,
    "small": lambda x: x * 1e-9, "large": lambda x: x * 1e7, "tiny": lambda x: x * 1e-30,
    "one more": lambda x: x + 1, "far": lambda x: x + 1e5, "back": lambda x: x - 1e5,
    "clip": lambda x: jnp.clip(x, -1, 2), "clip up": lambda x: jnp.clip(x, 0.2, 0.5),
    "reverse": lambda x: x[:, ::-1], "cumsum": lambda x: jnp.cumsum(x, 1),
    "roll": lambda x: jnp.roll(x, 1, 1), "sort": lambda x: jnp.sort(x, 1),
    "cummax": lambda x: lax.cummax(x, 1), "softmax": lambda x: jax.nn.softmax(x, 1),
    "centre": lambda x: x - jnp.mean(x, 1, keepdims=True),
    "mask": lambda x: jnp.where(FIRST_HALF, x, -1e9),
    "hide": lambda x: jnp.where(FIRST_HALF, x, 0), "hide all": lambda x: x * FIRST_HALF,
    "masked softmax": lambda x: jax.nn.softmax(jnp.where(FIRST_HALF, x, -1e9), 1),
    "near the top": lambda x: jnp.maximum(x, x.max(1, keepdims=True) - 1),
    "positive": lambda x: jnp.where(x > 0, x, x[:, ::-1]),
    "too large": lambda x: where_true(x > 2e6, x),
    "beyond 1": lambda x: where_true(jnp.abs(x) > 1, x),
    "near 1": lambda x: where_true(jnp.tanh(jnp.abs(x)) > 0.995, x),
    "to int": lambda x: x.astype(jnp.int32).astype(x.dtype),
    "int times": lambda x: (x.astype(jnp.int32) * 1000000).astype(x.dtype),
    "to bool": lambda x: where_true(x.astype(bool), x),
    "to half": lambda x: x.astype(jnp.float16).astype(x.dtype),
    "to bfloat16": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    "signbit": lambda x: where_true(jnp.signbit(x), x),
    "copysign": lambda x: jnp.copysign(1, x), "angle": lambda x: jnp.arctan2(x, -1.0),
    "bits": lambda x: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32) & 0x7F0FFFFF, jnp.float32
    ),
    "set": lambda x: x.at[:, 0].set(0), "add at": lambda x: x.at[:, 1].add(x[:, 2]),
    "project": lambda x: x @ jnp.array([[1.0, 0], [0, 0]]),
    "take": lambda x: jnp.take(x, jnp.argmax(x[0, :, 0])[None], axis=1) + 0 * x,
    "scan": scan, "cond": cond, "count up": count_up,
    "round": lambda x: jnp.round(x), "remainder": lambda x: jnp.fmod(x, 2),
    "power": lambda x: x**3, "inverse": lambda x: 1 / (1 + x * x),
    "erf": lax.erf, "atan": jnp.arctan, "expm1": jnp.expm1, "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "logsumexp": lambda x: x - jax.nn.logsumexp(x, 1, keepdims=True),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :T],
    "any": lambda x: where_true(jnp.any(x > 1, 1, keepdims=True), x),
    "parity": lambda x: jnp.where(x.astype(jnp.int32) % 2 == 0, x, 0),
    "count": lambda x: jnp.cumsum((x > 0).astype(jnp.int32), 1).astype(x.dtype),
}  # fmt: skip
TWO = {
    "add": jnp.add, "subtract": jnp.subtract, "multiply": jnp.multiply,
    "maximum": jnp.maximum, "minimum": jnp.minimum,
    "greater": lambda a, b: jnp.where(a > b, a, b),
    "less or equal": lambda a, b: jnp.where(a <= b, b, -a),
    "equal": lambda a, b: jnp.where(a == b, a, 1),
    "divide": lambda a, b: a / (1 + jnp.abs(b)),
    "finite": lambda a, b: jnp.where(jnp.isfinite(a), b, a),
    "masked": lambda a, b: jnp.where(a < -1e8, 0, b),
    "product": lambda a, b: jnp.einsum("btf,bsf->bts", a, b)[..., :F],
    "attend": lambda a, b: jnp.einsum("bts,bsf->btf", jnp.einsum("btf,bsf->bts", a, b), b),
    "power of": lambda a, b: jnp.abs(a) ** jnp.clip(b, -2, 2),
    "next after": jnp.nextafter, "copy sign": jnp.copysign,
    "hypot": lambda a, b: jnp.sqrt(a * a + b * b), "angle of": jnp.arctan2,
    "concatenate": lambda a, b: jnp.concatenate([a[:, :1], b[:, 1:]], 1),
}  # fmt: skip


class Program(NamedTuple):
    """Operations `(name, operand, operand)`; the last one's is the result."""

    operations: list

    def values(self, x):
        """What each operation gives."""
        values = [x]
        for name, first, second in self.operations:
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            values.append(ONE[name](a) if name in ONE else TWO[name](a, b))
        return values

    def __call__(self, x):
        return self.values(x)[-1]


operations = st.tuples(
    st.sampled_from([*ONE, *TWO]), st.sampled_from([0, 0, 0, 1, 2]), st.integers(0, 3)
)
programs = st.builds(Program, st.lists(operations, min_size=1, max_size=5))


def numbers(rng, bound, *shape):
    """Of all magnitudes within the bound, whole ones and zeros of both signs too."""
    magnitudes = np.exp(rng.uniform(np.log(1e-3), np.log(bound), shape))
    values = np.where(rng.random(shape) < 0.5, rng.normal(size=shape), magnitudes)
    values = np.where(rng.random(shape) < 0.2, np.round(values), values)
    values = np.where(rng.random(shape) < 0.1, 0.0, values)
    values = np.copysign(values, rng.normal(size=shape))
    return np.clip(values, -bound, bound).astype(np.float32)
