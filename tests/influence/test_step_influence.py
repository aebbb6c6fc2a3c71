import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import SingleDeviceSharding

import tdjax
from helpers import normal, x64

T = 5
ITSELF = np.eye(T, dtype=bool)
ALL = np.ones((T, T), bool)
PAST = np.tril(ALL)
DISTANCE = np.subtract.outer(np.arange(T), np.arange(T))
FIRST_TOO = ITSELF | (np.arange(T) == 0)
X = normal(0, 2, T, 4)
KEY = jax.random.key(0)
HERE = SingleDeviceSharding(jax.devices()[0])


def linen(module, **kwargs):
    rngs = {"params": KEY, "dropout": KEY}
    variables = module.init(rngs, X, **kwargs)
    return lambda x: module.apply(variables, x, rngs=rngs, **kwargs)


def gru(**kwargs):
    return nn.RNN(nn.GRUCell(3), **kwargs)


def attend(logits, x):
    return jax.nn.softmax(logits) @ x


def logits(x):
    return jnp.einsum("btd,bsd->bts", x, x) / 3


def attend_to_the_past(x, mask=-1e9):
    return attend(jnp.where(PAST, logits(x), mask), x)


@jax.jit
def scan_keys(x):
    """A scan that gives the random keys of its steps besides what it computes."""

    def body(key, x):
        key, used = jax.random.split(key)
        return key, (x * jax.random.normal(used), used)

    return lax.scan(body, KEY, x.swapaxes(0, 1))[1][0].swapaxes(0, 1)


SHARED = tdjax.init_dense(KEY, 4, 3)
FLATTENED = tdjax.init_flatten_dense(KEY, T, 4, 3)
OWN = tdjax.init_per_step_dense(KEY, T, 4, 3)

CASES = {
    "shared": (lambda x: tdjax.dense(SHARED, x), ITSELF),
    "per step": (lambda x: tdjax.per_step_dense(OWN, x), ITSELF),
    "flattened": (lambda x: tdjax.flatten_dense(FLATTENED, x), ALL),
    "shared written as flattened": (
        lambda x: tdjax.flatten_dense(tdjax.as_flatten(SHARED, T), x),
        ITSELF,
    ),
    "time_distributed": (tdjax.time_distributed(jnp.sin, chunk_size=2), ITSELF),
    "folded in chunks": (
        tdjax.time_distributed(jnp.sin, chunk_size=2, method="fold", remat=True),
        ITSELF,
    ),
    "GRU": (linen(gru()), PAST),
    "GRU backwards": (linen(gru(reverse=True, keep_order=True)), PAST.T),
    "bidirectional GRU": (linen(nn.Bidirectional(gru(), gru())), ALL),
    "LSTM": (linen(nn.RNN(nn.LSTMCell(3))), PAST),
    # Derivatives that are zero at X, or everywhere.
    "closed relu": (lambda x: jax.nn.relu(x - 100), ITSELF),
    "closed gate": (lambda x: jax.nn.relu(x - 100) * x[:, :1], FIRST_TOO),
    "mask from the input": (lambda x: jnp.where(x > 100, x, 0), ITSELF),
    "mask from another step": (lambda x: jnp.where(x[:, :1] > 100, x, 0), FIRST_TOO),
    "saturated": (lambda x: jnp.tanh(1e6 * x), ITSELF),
    "rounded": (lambda x: jnp.round(x), ITSELF),
    "compared": (lambda x: x > 0, ITSELF),
    "integers that wrap": (
        lambda x: (200 + 50 * jax.nn.sigmoid(x)).astype(jnp.int32).astype(jnp.int8) > 0,
        ITSELF,
    ),
    "integers that overflow": (
        lambda x: (jnp.int32(3e6) + x.astype(jnp.int32)) * 1000 > 0,
        ITSELF,
    ),
    "argmax": (lambda x: jax.nn.one_hot(x.argmax(-1), 4), ITSELF),
    "stop_gradient": (lambda x: lax.stop_gradient(x), ITSELF),
    # Constants that cut paths.
    "constant": (lambda x: jnp.zeros((2, 3, 1)), np.zeros((3, T), bool)),
    "times zero": (lambda x: 0 * x, ~ALL),
    "constant mask": (
        lambda x: x * jnp.array([1.0, 1, 0, 1, 0])[:, None],
        np.diag([True, True, False, True, False]),
    ),
    "constant where": (
        lambda x: jnp.where(jnp.arange(T)[:, None] < 2, x, 0),
        np.diag([True, True, False, False, False]),
    ),
    "dropout": (linen(nn.Dropout(0.5, deterministic=False)), ITSELF),
    # Attention.
    "attention": (linen(nn.MultiHeadDotProductAttention(2)), ALL),
    "causal attention, Flax": (
        linen(
            nn.MultiHeadDotProductAttention(2),
            mask=nn.make_causal_mask(jnp.ones((2, T))),
        ),
        PAST,
    ),
    "causal attention, JAX": (
        lambda x: jax.nn.dot_product_attention(*3 * (x[:, :, None],), is_causal=True)[
            :, :, 0
        ],
        PAST,
    ),
    "causal attention, -inf": (lambda x: attend_to_the_past(x, -jnp.inf), PAST),
    "causal attention, -1e9 added": (
        lambda x: attend(logits(x) + jnp.where(PAST, 0, -1e9), x),
        PAST,
    ),
    "causal attention twice": (
        lambda x: attend_to_the_past(attend_to_the_past(x)),
        PAST,
    ),
    "causal attention, after a mask from the input": (
        lambda x: attend_to_the_past(jax.nn.softmax(jnp.where(x > 0, x, -1e9))),
        PAST,
    ),
    # Norms, convolutions, pooling.
    "LayerNorm": (linen(nn.LayerNorm()), ITSELF),
    "batch statistics": (lambda x: (x - x.mean((0, 1))) / x.std((0, 1)), ALL),
    "convolution": (linen(nn.Conv(4, (3,))), abs(DISTANCE) <= 1),
    "causal convolution": (
        linen(nn.Conv(4, (3,), padding="CAUSAL")),
        (DISTANCE >= 0) & (DISTANCE <= 2),
    ),
    "dilated convolution": (
        linen(nn.Conv(4, (2,), kernel_dilation=2, padding="CAUSAL")),
        (DISTANCE == 0) | (DISTANCE == 2),
    ),
    "max pooling": (
        lambda x: nn.max_pool(x, (2,), (1,), "SAME"),
        (DISTANCE == 0) | (DISTANCE == -1),
    ),
    "mean pooling": (
        lambda x: nn.avg_pool(x, (2,), (2,)),
        np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], bool),
    ),
    # Moving, adding up, sorting.
    "reversed": (lambda x: x[:, ::-1], ITSELF[::-1]),
    "rolled": (lambda x: jnp.roll(x, 1, axis=1), ITSELF[[4, 0, 1, 2, 3]]),
    "shifted in": (
        lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
        DISTANCE == 1,
    ),
    "set": (lambda x: x.at[:, 1].set(x[:, 3]), ITSELF[[0, 3, 2, 3, 4]]),
    "added": (
        lambda x: x.at[:, 1].add(x[:, 3]),
        ITSELF | ((np.arange(T)[:, None] == 1) & (np.arange(T) == 3)),
    ),
    "gathered": (lambda x: x[:, jnp.array([4, 4, 0])], ITSELF[[4, 4, 0]]),
    "cumsum": (lambda x: jnp.cumsum(x, axis=1), PAST),
    "cumulative maximum, backwards": (
        lambda x: lax.cummax(x, axis=1, reverse=True),
        PAST.T,
    ),
    "associative scan": (lambda x: lax.associative_scan(jnp.add, x, axis=1), PAST),
    "sorted over time": (lambda x: jnp.sort(x, axis=1), ALL),
    "sorted over features": (lambda x: jnp.sort(x, axis=-1), ITSELF),
    # Control flow.
    "branch on the first step": (
        lambda x: lax.cond(x[0, 0, 0] > 0, lambda x: x, lambda x: 2 * x, x),
        FIRST_TOO,
    ),
    "fori_loop": (
        lambda x: lax.fori_loop(1, T, lambda i, y: y.at[:, i].add(y[:, i - 1]), x),
        PAST,
    ),
    "scan with random keys": (scan_keys, ITSELF),
    "named, placed, kept in order": (
        lambda x: lax.optimization_barrier(
            (
                checkpoint_name(x, "x"),
                lax.with_sharding_constraint(x[:, ::-1], HERE),
            )
        )[1],
        ITSELF[::-1],
    ),
    "jit, checkpoint, custom_jvp": (
        jax.jit(jax.checkpoint(lambda x: jax.nn.silu(jax.nn.relu6(x)))),
        ITSELF,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_influence_is_what_the_function_says(name):
    fun, want = CASES[name]
    np.testing.assert_array_equal(tdjax.step_influence(fun, X), want)


@pytest.mark.parametrize("name", CASES)
def test_influence_does_not_depend_on_the_point(name):
    fun, want = CASES[name]
    for x in (jnp.zeros_like(X), -100 + X, jax.ShapeDtypeStruct(X.shape, X.dtype)):
        np.testing.assert_array_equal(tdjax.step_influence(fun, x), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_changes_the_output_is_an_influence(name):
    """No false negative: changing a step changes only the steps it influences."""
    fun, _ = CASES[name]
    influence = tdjax.step_influence(fun, X)
    for scale in (1.0, 100.0):
        x = scale * X
        for j in range(T):
            changed = fun(x.at[:, j].set(scale * normal(j + 1, 2, 4))) != fun(x)
            moved = np.asarray(changed).any(axis=(0, 2))
            assert not (moved & ~influence[:, j]).any()


@given(st.lists(st.sampled_from(["relu", "conv", "cumsum", "flip", "mask", "dense"])))
def test_influence_covers_the_jacobian_of_random_programs(names):
    weights = normal(3, 4, 4)
    parts = {
        "relu": jax.nn.relu,
        "conv": lambda x: x.at[:, 1:].add(x[:, :-1]),
        "cumsum": lambda x: jnp.cumsum(x, axis=1),
        "flip": lambda x: x[:, ::-1],
        "mask": lambda x: x * (jnp.arange(T) % 2)[:, None],
        "dense": lambda x: x @ weights,
    }

    def fun(x):
        for name in names:
            x = parts[name](x)
        return x

    jacobian = np.zeros((T, T))
    for seed in range(3):
        full = jax.jacobian(fun)(normal(seed, 1, T, 4))
        jacobian += np.abs(full).sum((0, 2, 3, 5))
    influence = tdjax.step_influence(fun, X)
    assert not ((jacobian > 1e-5) & ~influence).any()
    if "relu" not in names:
        np.testing.assert_array_equal(influence, jacobian > 1e-5)


def test_integer_inputs_and_another_number_of_steps():
    embed = nn.Embed(7, 3)
    variables = embed.init(KEY, jnp.zeros((1, 1), int))
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    apply = lambda t: embed.apply(variables, t)
    np.testing.assert_array_equal(tdjax.step_influence(apply, tokens), ITSELF)
    causal = lambda t: attend_to_the_past(apply(t))
    np.testing.assert_array_equal(tdjax.step_influence(causal, tokens), PAST)
    last = lambda x: x[:, -1:]
    np.testing.assert_array_equal(tdjax.step_influence(last, X), ITSELF[-1:])


def test_an_operation_without_a_rule_counts_as_all_to_all():
    fun = lambda x: jnp.fft.fft(x, axis=-1).real
    np.testing.assert_array_equal(tdjax.step_influence(fun, X), ALL)


def test_bound_says_how_large_values_may_be():
    masked = lambda x: attend(logits(x) + jnp.where(PAST, 0, -1e4), x)
    np.testing.assert_array_equal(tdjax.step_influence(masked, X), ALL)
    np.testing.assert_array_equal(tdjax.step_influence(masked, X, bound=100.0), PAST)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: tdjax.step_influence(3, X),
            TypeError,
            "fun must be callable, got int",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, X[0, 0]),
            ValueError,
            r"args\[0\] is mapped over axis 1 and must have that axis, got float32\[4\]",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, [1.0]),
            TypeError,
            r"args\[0\]\[0\] .* must be an array",
        ),
        (
            lambda: tdjax.step_influence(lambda x: x.sum((1, 2)), X),
            ValueError,
            r"a result of fun .* must have that axis, got float32\[2\]",
        ),
        (
            lambda: tdjax.step_influence(lambda x: (x, x[:, :1]), X),
            ValueError,
            r"results of fun must have one number of steps, got float32.*None in out_axes",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, X, out_axes=None),
            ValueError,
            "one number of steps, got none",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, X, argnums=1),
            ValueError,
            r"argnums must be positions among the 1 argument\(s\), got 1",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, X, argnums="x"),
            TypeError,
            "argnums must be an int or several, got 'x'",
        ),
        (
            lambda: tdjax.step_influence(jnp.add, X, X, argnums=(0, 1), in_axes=(1,)),
            ValueError,
            r"in_axes must have an entry for each of argnums=\(0, 1\)",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, X, in_axes=None),
            ValueError,
            "in_axes",
        ),
        (
            lambda: tdjax.step_influence(jnp.sin, X, bound=0),
            ValueError,
            "bound must be pos",
        ),
    ],
)
def test_bad_input_names_the_argument(user_errors, call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "compare",
    [
        # As float64, the two sides are equal.
        lambda zero, big: zero + (big + 1) == big,
        lambda zero, big: (zero + (big - 1)) + 2 == big,
        lambda zero, big: jnp.maximum(zero, big + 1) == big,
    ],
)
def test_a_large_integer_is_not_taken_for_its_neighbour(compare):
    with x64():
        big = jnp.int64(2**53)
        same = lambda x: compare(x.astype(jnp.int64) * 0, big)
        fun = lambda x: jnp.where(same(x), 0.0, x[:, ::-1])
        x = jnp.ones((1, 3, 1))
        assert (tdjax.step_influence(fun, x) >= np.eye(3, dtype=bool)[::-1]).all()


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: (x - 1e9).astype(jnp.int32) & -8,
        lambda x: x.astype(jnp.int32) * 1_000_000,
        lambda x: jnp.cumsum(x.astype(jnp.int32), 1),
        lambda x: x.astype(jnp.int32).at[:, 0].add(5),
    ],
)
def test_an_integer_may_have_any_value_as_a_float_too(fun):
    moves = lambda x: jnp.where(fun(x).astype(jnp.float32) > 2e6, x, 0.0)
    below = lambda x: jnp.where(fun(x).astype(jnp.float32) < -2e6, x, 0.0)
    x = jnp.ones((1, 2, 1))
    for either in (moves, below):
        assert np.diagonal(tdjax.step_influence(either, x)).all()


def test_integer_inputs_may_have_any_value():
    x = jax.ShapeDtypeStruct((1, 2, 1), jnp.int32)
    for fun in (
        lambda x: x.astype(jnp.float32) > 2e6,
        lambda x: jax.nn.relu(x.astype(jnp.float32) - 2e6),
    ):
        assert (tdjax.step_influence(fun, x) == np.eye(2, dtype=bool)).all()
    small = jax.ShapeDtypeStruct((1, 2, 1), jnp.uint8)
    above = lambda x: x.astype(jnp.float32) > 150
    assert tdjax.step_influence(above, small, bound=100.0).any()


TWO = jnp.ones((1, 2, 1))
DIAGONAL = np.eye(2, dtype=bool)


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.arctan2(x * 0, -1.0),
        lambda x: jnp.copysign(1.0, x * 0),
        lambda x: jnp.signbit(-(x * 0)).astype(float),
        lambda x: jnp.signbit(x @ jnp.zeros((1, 1))),
        lambda x: jnp.arctan2(jnp.concatenate([x, x], -1)[..., :1] * 0, -1.0),
        lambda x: lax.scan(lambda c, v: (c, v * 0), 0.0, x)[1] + jnp.arctan2(x * 0, -1.0),
        lambda x: jax.pure_callback(np.signbit, jax.ShapeDtypeStruct((1, 2, 1), bool), x * 0),
    ],
)  # fmt: skip
def test_the_sign_of_a_zero_is_a_path(fun):
    assert tdjax.step_influence(fun, TWO)[DIAGONAL].all()


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.arctan2(x, -1.0),
        lambda x: jnp.arctan2(jax.nn.relu(x), -1.0),
        lambda x: jnp.nextafter(x, jnp.ones_like(x)),
    ],
)
def test_where_no_zero_was_computed_signs_keep_to_their_step(fun):
    np.testing.assert_array_equal(tdjax.step_influence(fun, TWO), DIAGONAL)


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: (x + 1e30) - 1e30,
        lambda x: (x * 1e-30 + 1) - 1,
        lambda x: x / 1e30 / 1e30 * 1e30 * 1e30,
        lambda x: jnp.sum(jnp.stack([x, 0 * x + 1e30, 0 * x - 1e30]), 0),
        lambda x: (x * 1e-30 * 1e-30) * 1e30 * 1e30,
        lambda x: jnp.log1p(x * 1e-30) * 1e30,
        lambda x: jnp.log(jnp.exp(x * 1e-23)) * 1e23,
        lambda x: jnp.exp(x * 1e-23) ** 1e22,
        lambda x: jnp.log(jnp.exp2(x * 1e-23)) * 1e23,
        lambda x: (jnp.sqrt(1 + jnp.square(x * 1e-20)) - 1) * 1e38,
    ],
)
def test_what_rounding_absorbs_is_a_path(fun):
    # Under `jit` XLA may write these sums and products in another way.
    np.testing.assert_array_equal(tdjax.step_influence(fun, TWO), DIAGONAL)


@pytest.mark.parametrize(
    ("fun", "bound"),
    [
        (lambda x: jnp.exp(abs(x - 60.0)) > jnp.exp(60.0), 50.0),
        (lambda x: jnp.maximum(jnp.exp2(jnp.floor(x + 30.0)), 2.0**29), 20.0),
        (lambda x: jnp.tanh(abs(x - 3)) > 0.995, 0.5),
        (lambda x: jnp.exp(jnp.cumsum(x - 60.0, 1) * -1) > jnp.exp(60.0), 50.0),
        (lambda x: jax.lax.erf(jnp.ceil(x) + 1) > 0.9, 0.8),
        (lambda x: jnp.expm1((x - 3) ** 2) > 9000.0, 0.1),
        (lambda x: jnp.clip(x, 3, 4) * 2 > 7, 4.0),
        (lambda x: jnp.clip(x, -4, -3) * 2 > -7, 4.0),
    ],
)
def test_a_constant_beyond_the_bound_is_not_forgotten(fun, bound):
    assert tdjax.step_influence(fun, TWO, bound=bound)[DIAGONAL].all()


def test_a_softmax_has_no_positive_exponents_whatever_its_logits():
    def aligned(x):
        far = jnp.cumsum(x, 1) - 1e8
        return jnp.exp(far - jnp.maximum(far.max(1, keepdims=True), -1e30)) > 2.0

    assert not tdjax.step_influence(aligned, TWO).any()

    def misaligned(x):
        square = x[..., 0]
        return jnp.exp(square - square.max(1)[None, :])[..., None] > 2.0

    assert tdjax.step_influence(misaligned, jnp.ones((2, 2, 1)), bound=10.0).any()


def test_arrays_that_are_written_to_count_as_all_to_all():
    def fun(x):
        sums = jax.new_ref(jnp.zeros_like(x))
        sums[...] = x
        sums[:, 0] += 1
        return sums[...]

    assert tdjax.step_influence(fun, TWO).all()
    assert tdjax.step_influence(jax.jit(fun), TWO).all()


@pytest.mark.parametrize(
    ("fun", "wanted"),
    [
        (lambda x: jnp.where(jnp.clip(x, 0.2, 0.5).astype(bool), x[:, ::-1], 0), DIAGONAL[::-1]),
        (lambda x: jnp.where(jnp.clip(x, 2, 5).astype(bool), 0, x), 0 * DIAGONAL),
        (lambda x: jnp.where(jax.nn.sigmoid(jnp.clip(x, 1, 2)) < 0.8, x[:, ::-1], 0), DIAGONAL | DIAGONAL[::-1]),
        (lambda x: jnp.where(jnp.sin(-jnp.exp(x)) > 2e6, x[:, ::-1], 0), 0 * DIAGONAL),
    ],
)  # fmt: skip
def test_choices_by_ranges_of_computed_values(fun, wanted):
    got = tdjax.step_influence(fun, TWO)
    np.testing.assert_array_equal(got, wanted.astype(bool))


def test_an_integer_that_float64_cannot_hold_is_not_taken_for_its_neighbour():
    with x64():
        near = jnp.int64(2**53)
        chosen = lambda x: jnp.where(x > 0, near + 1, near) - near
        influence = tdjax.step_influence(chosen, jnp.ones((1, 2, 1), jnp.float64))
    np.testing.assert_array_equal(influence, np.eye(2, dtype=bool))


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.arctan((x * 0).astype(complex) + complex(-0.0, 2.0)).real,
        lambda x: lax.while_loop(
            lambda s: s[0] < jnp.abs(x[0, 1, 0]),
            lambda s: (s[0] + 1, jnp.copysign(1.0, s[1])),
            (0.0, x * 0),
        )[1],
        lambda x: (x * 0).at[:, :1].apply(lambda v: jnp.copysign(1.0, v)),
        lambda x: lax.reduce_window(
            x * 0, 1.0, lambda a, b: a * jnp.copysign(1.0, b), (1, 1, 1), (1, 1, 1), "SAME"
        ),
    ],
)  # fmt: skip
def test_signs_of_zeros_go_through_what_has_no_rule(fun):
    """Each of these moves with the sign of the first step's input."""
    x = normal(0, 1, 3, 1)
    influence = tdjax.step_influence(fun, x)
    flipped = x.at[0, 0].multiply(-1)
    moved = np.asarray(fun(x) != fun(flipped)).any((0, 2))
    assert moved[0]
    assert influence[moved, 0].all()


@pytest.mark.parametrize("end", [lambda x: jax.nn.relu(x), lambda x: -jax.nn.relu(x)])
@pytest.mark.parametrize(
    "compare",
    [jnp.equal, lambda a, b: jnp.equal(b, a), lambda a, b: ~jnp.not_equal(b, a)],
)
def test_a_number_at_the_end_of_a_range_is_not_certain(end, compare):
    """`relu(x) == 0` may be false."""
    fun = lambda x: jnp.where(compare(end(x), 0.0), 0.0, x[:, ::-1])
    influence = tdjax.step_influence(fun, jnp.ones((1, 3, 1)))
    assert influence[np.eye(3, dtype=bool)[::-1]].all()


class Model(nn.Module):
    """A causal model of a batch of two inputs, one with time first."""

    @nn.compact
    def __call__(self, batch):
        x = batch["x"] + jnp.swapaxes(batch["shift"], 0, 1)
        hidden = nn.RNN(nn.GRUCell(3))(x)
        return {"logits": nn.Dense(2)(hidden), "loss": hidden.sum()}


def test_a_whole_model_of_parameters_and_a_batch():
    batch = {"x": normal(0, 2, 4, 3), "shift": normal(1, 4, 2, 3), "scale": 2.0}
    model = Model()
    params = model.init(jax.random.key(0), batch)
    options = {
        "argnums": 1,
        "in_axes": {"x": 1, "shift": 0, "scale": None},
        "out_axes": {"logits": 1, "loss": None},
    }
    influence = tdjax.step_influence(model.apply, params, batch, **options)
    np.testing.assert_array_equal(influence, np.tri(4, dtype=bool))
    tdjax.assert_causal(model.apply, params, batch, **options)
    # Zero parameters cut every path; those that are not known cut none.
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert not tdjax.step_influence(model.apply, zeros, batch, **options).any()
    shapes = jax.eval_shape(lambda: params)
    influence = tdjax.step_influence(model.apply, shapes, batch, **options)
    np.testing.assert_array_equal(influence, np.tri(4, dtype=bool))


def test_several_arguments_vary_together_and_the_rest_is_constant():
    fun = lambda a, b, c: a[:, ::-1] * 0 + b + jnp.cumsum(c, 1)
    x = normal(0, 1, 3, 2)
    for argnums, expected in (
        (1, np.eye(3)),
        (2, np.tri(3)),
        ((1, -1), np.tri(3)),
        ([0, 1], np.eye(3)),
    ):
        got = tdjax.step_influence(fun, x, x, x, argnums=argnums)
        np.testing.assert_array_equal(got, expected.astype(bool))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_time_may_be_any_axis(axis):
    x = jnp.moveaxis(normal(0, 3, 2, 4), 0, axis)
    fun = lambda x: jnp.cumsum(x, axis)
    got = tdjax.step_influence(fun, x, in_axes=axis, out_axes=axis)
    np.testing.assert_array_equal(got, np.tri(3, dtype=bool))


def test_a_leak_from_the_future_is_named():
    x = normal(0, 2, 5, 3)
    shift_left = lambda x: x.at[:, 2:].set(jnp.roll(x, -1, 1)[:, 2:])
    message = r"output step 2 depends on input step 3 \(2 such pairs among 5 steps\)"
    with pytest.raises(AssertionError, match=message):
        tdjax.assert_causal(shift_left, x)
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    attend = nn.MultiHeadDotProductAttention(1)
    params = attend.init(jax.random.key(0), x)
    tdjax.assert_causal(
        lambda p, x: attend.apply(p, x, mask=mask), params, x, argnums=1
    )
    with pytest.raises(AssertionError, match="output step 0 depends on input step 1"):
        tdjax.assert_causal(attend.apply, params, x, argnums=1)


def test_causality_needs_equal_numbers_of_steps(user_errors):
    with pytest.raises(ValueError, match=r"5 steps that returns 2"):
        tdjax.assert_causal(lambda x: x[:, :2], normal(0, 2, 5, 3))
