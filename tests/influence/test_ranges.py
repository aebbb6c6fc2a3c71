"""The range of each result holds all that the operation gives, and hardly more.

Each element of the input has an interval of its own. The operation is run on every
combination of the ends and the middle of these intervals, and on their zeros.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tdjax._influence.interpreter import evaluate
from tdjax._influence.spread import spread

LOW = np.array([[0.25, -3.0, 2.0], [-4.0, 1.0, -0.5]])
HIGH = np.array([[0.75, -2.0, 5.0], [0.5, 1.0, -0.25]])
BOUND = 1e6


def all_inputs(low, high):
    """`(samples, *shape)`: every combination of a few numbers in each interval."""
    choices = [
        {a, b, (a + b) / 2, min(max(0.0, a), b)} for a, b in zip(low.flat, high.flat)
    ]
    return np.reshape([*itertools.product(*choices)], (-1, *low.shape))


def range_of(fun, low, high, dtype):
    """What the interpreter says of the result's range."""
    program = jax.make_jaxpr(fun)(jax.ShapeDtypeStruct(low.shape, dtype))
    steps = np.eye(low.shape[0], dtype=bool)[:, :, None] & (low != high)
    x = spread(np.dtype(dtype), steps, low, high, False, BOUND)
    (y,) = evaluate(program.jaxpr, program.consts, [x], BOUND)
    return y.low, y.high


def seen_of(funs, low, high, dtype):
    """The least and the largest result of each function that was seen."""
    run = jax.jit(jax.vmap(lambda x: {name: fun(x) for name, fun in funs.items()}))
    results = run(jnp.asarray(all_inputs(low, high), dtype))
    ends = lambda y: (np.min(y, 0).astype(np.float64), np.max(y, 0).astype(np.float64))
    return {name: ends(np.asarray(y)) for name, y in results.items()}


EXACT = {
    "add": lambda x: x + x[::-1],
    "subtract": lambda x: x - x[::-1],
    "multiply": lambda x: x[:, :2] * x[:, 1:],
    "multiply by numbers": lambda x: x * jnp.array([-2.0, 3, 0.5]),
    "divide": lambda x: x[:, ::2] / x[:, 1:2],
    "divide by numbers": lambda x: x / jnp.array([-2.0, 3, 0.5]),
    "negative": jnp.negative,
    "maximum": lambda x: jnp.maximum(x, x[::-1]),
    "maximum with a number": lambda x: jnp.maximum(x, 0.5),
    "minimum": lambda x: jnp.minimum(x, x[::-1]),
    "clamp": lambda x: lax.clamp(-1.0, x, 0.5),
    "clamp by the input": lambda x: lax.clamp(x[0, 1], x, x[1, 1]),
    "less": lambda x: x[0] < x[1],
    "less or equal": lambda x: x[:, ::2] <= x[:, 1:2],
    "greater": lambda x: x > 0.75,
    "greater or equal": lambda x: x >= 0.75,
    "equal": lambda x: x == 1,
    "not equal": lambda x: x != 1,
    "and": lambda x: (x > 0) & (x[::-1] > 0),
    "or": lambda x: (x > 0) | (x[::-1] > 0),
    "not": lambda x: ~(x > 0),
    "to int": lambda x: x.astype(jnp.int32),
    "to bool": lambda x: jnp.floor(x).astype(bool),
    "abs": abs,
    "square": jnp.square,
    "cube": lambda x: lax.integer_pow(x, 3),
    "fourth power": lambda x: lax.integer_pow(x, 4),
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": lambda x: jnp.round(x * 2),
    "is finite": jnp.isfinite,
    "tanh": jnp.tanh,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "sinh": jnp.sinh,
    "cbrt": jnp.cbrt,
    "log1p": lambda x: jnp.log1p(abs(x)),
    "expm1": jnp.expm1,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "log": lambda x: jnp.log(abs(x) + 0.5),
    "sqrt": lambda x: jnp.sqrt(abs(x)),
    "logistic": jax.nn.sigmoid,
    "choose": lambda x: jnp.where(x > 0, x, x - 1),
    "choose by a constant": lambda x: jnp.where(jnp.arange(3) < 2, x, -7),
    "sum": lambda x: x.sum(1),
    "sum of steps": lambda x: x.sum(0),
    "largest": lambda x: x.max(1),
    "largest of all": lambda x: x.max(),
    "least": lambda x: x.min(1),
    "least of steps": lambda x: x.min(0),
    "running largest": lambda x: lax.cummax(x, 1),
    "running least": lambda x: lax.cummin(x, 1, reverse=True),
    "concatenate": lambda x: jnp.concatenate([x[:, 1:], x], 1),
    "transpose": lambda x: jnp.transpose(x)[::-1],
    "reshape": lambda x: x.reshape(3, 2),
    "stack": lambda x: jnp.stack([x, -x], 1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=9.0),
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (2, 4, 3)),
    "take": lambda x: jnp.take(x, jnp.array([2, 0]), 1),
}


@pytest.fixture(scope="module")
def seen():
    return seen_of(EXACT, LOW, HIGH, "float32")


@pytest.mark.parametrize("name", EXACT)
def test_a_range_is_what_the_operation_gives(name, seen):
    low, high = range_of(EXACT[name], LOW, HIGH, "float32")
    least, most = seen[name]
    assert (low <= least).all()
    assert (high >= most).all()
    np.testing.assert_allclose(low, least, 1e-5, 1e-5)
    np.testing.assert_allclose(high, most, 1e-5, 1e-5)


WIDER = {
    "sin": (lambda x: jnp.sin(x[:, ::2]), -1, 1),
    "cos": (lambda x: jnp.cos(x[:, ::2]), -1, 1),
    "argmax": (lambda x: jnp.argmax(x[:, ::2], 1), 0, 1),
    "argmin": (lambda x: jnp.argmin(x, 1), 0, 2),
    "inverse square": (lambda x: lax.integer_pow(x, -2), -BOUND, BOUND),
    "quotient of what may be zero": (lambda x: x[0, :1] / x[1, :1], -BOUND, BOUND),
    "bits": (lambda x: x.astype(jnp.int32) & 3, -(2**31), 2**31 - 1),
}


@pytest.mark.parametrize("name", WIDER)
def test_what_is_not_followed_has_a_range_that_is_known_to_hold(name):
    fun, lowest, highest = WIDER[name]
    low, high = range_of(fun, LOW, HIGH, "float32")
    varies = low != high
    assert varies.any()
    assert (low[varies] == lowest).all()
    assert (high[varies] == highest).all()


def test_ranges_of_integers():
    funs = {
        "quotient": lambda x: lax.div(x, jnp.array([[2, -3, 5]] * 2)),
        "product": lambda x: x * jnp.array([2, -3, 5]),
        "to float": lambda x: x.astype(jnp.float32),
    }
    low, high = np.floor(LOW * 4), np.ceil(HIGH * 4)
    for name, seen in seen_of(funs, low, high, "int32").items():
        got = range_of(funs[name], low, high, "int32")
        np.testing.assert_array_equal(got, seen, err_msg=name)
