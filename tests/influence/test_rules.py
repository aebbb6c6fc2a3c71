"""Each rule of `step_influence` beside brute force: change a step, see what moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import SingleDeviceSharding

import tdjax
from helpers import x64
from tdjax._influence.rules import RULES

T = 4
FAR = -1e9
VALUES = np.array([-3, -1, -0.5, 0, 0.25, 0.5, 1, 2, 7, 1e3, -4e5])
KERNEL = np.array([[1.0, 0, 2], [0, 0, -1], [0.5, 0, 1]], np.float32)


def observed(run, x):
    """Which outputs change when one input step does: x is `(samples, 2, batch, T)`."""
    base, other = x[:, 0], x[:, 1]
    changed = [base, *(base.at[:, :, j].set(other[:, :, j]) for j in range(T))]
    y, *moved = np.split(run(jnp.concatenate(changed)), T + 1)
    differs = lambda z: ((y != z) & ~(np.isnan(y) & np.isnan(z))).any((0, 1))
    return np.stack([differs(z) for z in moved], axis=-1)


def assert_covers(fun, x, run=None):
    """`run` is `fun` for many examples, one after the other."""
    run = run or jax.jit(lambda x: lax.map(fun, x))
    influence = tdjax.step_influence(fun, jax.ShapeDtypeStruct(x.shape[2:], x.dtype))
    missed = observed(run, x) & ~influence
    assert not missed.any(), np.argwhere(missed)


def samples(dtype, values=VALUES):
    drawn = np.random.default_rng(0).choice(values, (24, 2, 1, T))
    return jnp.asarray(drawn.astype(dtype))


def whole(z):
    return z.astype(jnp.int32)


def times_i(z):
    return lax.complex(z, 2 * z)


def reduce(combine, start):
    return lambda z: lax.reduce(z > 0, start, combine, (1,))


def window(combine, start):
    return lambda z: lax.reduce_window(z, start, combine, (1, 2), (1, 1), "VALID")


def conv(z):
    return lax.conv_general_dilated(z[:, None], KERNEL[:1, None], (1,), [(2, 0)])


def add_at(z):
    return jnp.ones((1, T)).at[:, jnp.array([2, 0])].add(z[:, :2])


HOW_TO_USE = {
    "add": lambda z: z + z[:, ::-1],
    "add_any": lambda z: jax.vjp(lambda v: (2 * v, 3 * v), z)[1]((z, -z))[0],
    "and": lambda z: (z > 0) & (z[:, ::-1] < 1),
    "argmax": lambda z: lax.argmax(z, 1, jnp.int32),
    "argmin": lambda z: lax.argmin(z, 1, jnp.int32),
    "atan2": lambda z: lax.atan2(z, z[:, ::-1]),
    "broadcast_in_dim": lambda z: lax.broadcast_in_dim(z, (2, 1, T), (1, 2)),
    "clamp": lambda z: lax.clamp(jnp.float32(-1), z, jnp.float32(2)),
    "concatenate": lambda z: lax.concatenate([z[:, 2:], z[:, :3]], 1),
    "conj": lambda z: lax.conj(times_i(z)).imag,
    "conv_general_dilated": conv,
    "convert_element_type": lambda z: z.astype(jnp.bfloat16),
    "copy": lambda z: jnp.array(z, copy=True),
    "cumlogsumexp": lambda z: lax.cumlogsumexp(z, 1),
    "cummax": lambda z: lax.cummax(z, 1),
    "cummin": lambda z: lax.cummin(z, 1, reverse=True),
    "cumprod": lambda z: lax.cumprod(z, 1),
    "cumsum": lambda z: lax.cumsum(z, 1, reverse=True),
    "div": lambda z: lax.div(whole(z), 3),
    "dot_general": lambda z: z[:, 1:] @ KERNEL,
    "dynamic_slice": lambda z: lax.dynamic_slice(z, (0, 1), (1, 2)),
    "dynamic_update_slice": lambda z: lax.dynamic_update_slice(z, z[:, 2:], (0, 1)),
    "eq": lambda z: z == 2,
    "gather": lambda z: jnp.take(z, jnp.array([3, 9, 2]), 1, fill_value=-3e9),
    "ge": lambda z: z >= 2,
    "gt": lambda z: z > z[:, ::-1],
    "imag": lambda z: lax.imag(times_i(z)),
    "integer_pow": lambda z: lax.integer_pow(z, 3),
    "le": lambda z: z <= z[:, ::-1],
    "lt": lambda z: z < 2,
    "max": lambda z: jnp.maximum(z, z[:, ::-1]),
    "min": lambda z: jnp.minimum(z, 0.5),
    "mul": lambda z: z * z[:, ::-1],
    "name": lambda z: checkpoint_name(z, "kept"),
    "ne": lambda z: z != 2,
    "nextafter": lambda z: lax.nextafter(z, jnp.zeros_like(z)),
    "not": lambda z: ~(z > 1),
    "optimization_barrier": lambda z: lax.optimization_barrier((z, z[:, :1]))[0],
    "or": lambda z: (z > 0) | (z[:, ::-1] < 1),
    "pad": lambda z: lax.pad(z, z[0, 0], ((0, 0, 0), (1, 1, 1))),
    "pow": lambda z: lax.pow(abs(z), jnp.float32(1.5)),
    "real": lambda z: lax.real(times_i(z)),
    "reduce_and": reduce(lax.bitwise_and, True),
    "reduce_max": lambda z: z.max(1),
    "reduce_min": lambda z: z.min(1),
    "reduce_or": reduce(lax.bitwise_or, False),
    "reduce_precision": lambda z: lax.reduce_precision(z, 5, 3),
    "reduce_prod": lambda z: z.prod(1),
    "reduce_sum": lambda z: z.sum(1),
    "reduce_window": window(lambda a, b: a + 2 * b, 0.0),
    "reduce_window_max": window(lax.max, -np.inf),
    "reduce_window_min": window(lax.min, np.inf),
    "reduce_window_sum": window(lax.add, 0.0),
    "reduce_xor": reduce(lax.bitwise_xor, False),
    "rem": lambda z: lax.rem(z, jnp.float32(3)),
    "reshape": lambda z: z.reshape(2, 2),
    "rev": lambda z: lax.rev(z, (1,)),
    "scatter": lambda z: z.at[:, jnp.array([2, 0])].set(z[:, :2]),
    "scatter-add": add_at,
    "scatter_add": add_at,
    "select_n": lambda z: jnp.where(z > z[:, ::-1], z, 0.5),
    "sharding_constraint": lambda z: lax.with_sharding_constraint(
        z, SingleDeviceSharding(jax.devices()[0])
    ),
    "shift_left": lambda z: lax.shift_left(whole(z), 20),
    "shift_right_arithmetic": lambda z: lax.shift_right_arithmetic(whole(z), 1),
    "shift_right_logical": lambda z: lax.shift_right_logical(whole(z), 1),
    "slice": lambda z: z[:, 1:],
    "sort": lambda z: jnp.sort(z, 1),
    "split": lambda z: lax.split(z, (1, 3), 1)[1],
    "squeeze": lambda z: lax.squeeze(z, (0,)),
    "sub": lambda z: z - z[:, ::-1],
    "transpose": lambda z: z.T,
    "xor": lambda z: (z > 0) ^ (z[:, ::-1] < 1),
}


def partly_constant(x):
    """A variable, two constants, one of them far, and what may be either."""
    either = jnp.where(x[:, 3] > 1, x[:, 3], FAR)
    columns = [x[:, 0], jnp.full_like(either, 0.1), jnp.full_like(either, FAR), either]
    return jnp.stack(columns, axis=1)


def probed(rule, x, levels):
    """What the rule gives, and steps of x let through where it's at or below a level.

    The second part depends on a step only where the rule's range leaves that open.
    """
    y = rule(partly_constant(x)).reshape(-1, 1)
    levels = levels.astype(y.dtype)
    at_or_below = jnp.concatenate([y <= levels, y == levels], axis=1)[..., None]
    gated = jnp.where(at_or_below, x[0], 0)
    return jnp.concatenate([y.ravel().astype(jnp.float32), gated.ravel()])[None]


def some_results(y):
    """Five of the finite numbers that the rule gave."""
    y = np.unique(y[np.isfinite(y)])
    return jnp.asarray(np.resize(np.random.default_rng(1).permutation(y), 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_each_rule_covers_what_changes(name):
    rule = HOW_TO_USE.get(name) or getattr(lax, name, None)
    if rule is None:
        pytest.skip("not a function of this JAX")
    x = samples(np.float32)
    program = str(jax.make_jaxpr(rule)(x[0, 0]))
    assert any(f" {form}" in program for form in (name, name.replace("_add", "-add")))
    probe = functools.partial(probed, rule)
    run = jax.jit(lambda x, levels: lax.map(lambda x: probe(x, levels), x))
    # Small ones, so that no result of theirs is beyond the bound.
    every = jnp.clip(jnp.resize(x, (len(x) * (T + 1), 1, T)), -7, 7)
    results = jax.eval_shape(rule, x[0, 0]).size
    levels = some_results(np.asarray(run(every, jnp.zeros(5))[:9, 0, :results]))
    assert_covers(lambda x: probe(x, levels), x, lambda x: run(x, levels))


MASK = np.array([[True, True, False, True]])
SMALL = np.arange(-2, 9)
CLOSE = np.array([1.0, 1.0005, 1.001, 1.002])


def backwards_where(condition, x):
    """Steps in reverse order, so that a wrong decision misses a dependence."""
    return jnp.where(condition, x[:, ::-1], 0)


def masked(x, value=FAR):
    return jnp.where(MASK, x, value)


def sum_in_int8(x):
    total = jnp.clip(x, 50, 100).astype(jnp.int8).sum(1, dtype=jnp.int8)
    return backwards_where(total < 0, x)


def sum_in_float32(x):
    tenths = jnp.where(x > 1, 0.1, jnp.full((37, T), 0.1)).sum(0, keepdims=True)
    return backwards_where(tenths == jnp.full((37, T), 0.1).sum(0), x)


def window_from(start, of=lambda x: x):
    add = lambda a, b: a + b
    return lambda x: lax.reduce_window(of(x), start(x), add, (1, 1), (1, 1), "VALID")


ONCE_MISSED = {
    # A function of the element is no overwrite.
    "apply": (lambda x: x.at[:, 1].apply(jnp.sin), VALUES),
    # Constants beyond the bound stay beyond it.
    "far, matmul": (
        lambda x: backwards_where(masked(x) @ jnp.eye(T) < -1e8, x),
        VALUES,
    ),
    "far, abs": (lambda x: backwards_where(abs(masked(x)) > 1e8, x), VALUES),
    "far, cummax": (
        lambda x: backwards_where(lax.cummax(x.at[:, 0].set(FAR), 1) < -1e8, x),
        VALUES,
    ),
    "far, sort": (lambda x: backwards_where(jnp.sort(masked(x), 1) < -1e8, x), VALUES),
    "far, cumsum": (
        lambda x: backwards_where(jnp.cumsum(masked(x), 1) < -1e8, x),
        VALUES,
    ),
    "far, scatter-add": (
        lambda x: backwards_where(x.at[:, 1].add(FAR) < -1e8, x),
        VALUES,
    ),
    "far, filled in": (
        lambda x: backwards_where(
            x.at[:, np.array([0, 1, 2, 9])].get(mode="fill", fill_value=FAR) < -1e8, x
        ),
        VALUES,
    ),
    "far, chosen by the input": (
        lambda x: backwards_where(lax.cumsum(jnp.where(x > 0, x, FAR), 1) < -1e8, x),
        VALUES,
    ),
    "far, gathered by the input": (
        lambda x: backwards_where(
            jnp.array([0, FAR])[jnp.clip(x, 0, 1).astype(int)] < -1e8, x
        ),
        VALUES,
    ),
    # Integers of any size.
    "integer product": (lambda x: x * 1103515245 > 1500000, SMALL),
    "integer shift": (lambda x: x << 24 > 2000000, SMALL),
    "unsigned": (lambda x: x.astype(jnp.uint32) > 2000000000, SMALL),
    "sum that wraps": (sum_in_int8, VALUES),
    # Results as the dtype rounds them.
    "integer quotient": (
        lambda x: backwards_where(lax.div(masked(x, 7), 2) == 3, x),
        SMALL,
    ),
    "range of quotients": (
        lambda x: jnp.where(lax.div(jnp.clip(x, 4, 5), 3) <= 1, x, 0),
        SMALL,
    ),
    "bfloat16": (
        lambda x: jnp.where(jnp.clip(x, 1.001, 1.002).astype("bfloat16") <= 1, x, 0),
        CLOSE,
    ),
    "reduce_precision": (
        lambda x: jnp.where(
            lax.reduce_precision(jnp.clip(x, 1.001, 1.002), 8, 7) <= 1, x, 0
        ),
        CLOSE,
    ),
    "float32 product": (
        lambda x: backwards_where(masked(x, 0.1) * 3 == np.float32(0.1) * 3, x),
        VALUES,
    ),
    "underflow": (
        lambda x: jnp.where(jnp.clip(x, 1, 2) * 1e-30 * 1e-30 == 0, x, 0),
        VALUES,
    ),
    "float32 sum": (sum_in_float32, VALUES),
    # No order, no decision.
    "complex": (lambda x: x.astype("complex64") == 1, VALUES),
    # What used to stop with an error, or to count one operand of several.
    "window from the input": (window_from(lambda x: x[0, 0]), VALUES),
    "window of a constant": (window_from(lambda x: x[0, 0], jnp.ones_like), VALUES),
    "barrier": (lambda x: lax.optimization_barrier((x, x[:, :1]))[0], VALUES),
}


@pytest.mark.parametrize("name", ONCE_MISSED)
def test_a_constant_or_a_rounding_hides_no_influence(name):
    fun, values = ONCE_MISSED[name]
    dtype = {"f": np.float32, "i": np.int32}[values.dtype.kind]
    x = samples(dtype, values)
    assert_covers(lambda x: fun(x).ravel()[None], x)


def test_integers_that_floats_cannot_hold_are_not_known():
    fun = lambda x: (x > 0).astype(jnp.int64) + 2**60 - 2**60 > 0
    with x64():
        x = np.zeros((1, T))
        np.testing.assert_array_equal(tdjax.step_influence(fun, x), np.eye(T))
