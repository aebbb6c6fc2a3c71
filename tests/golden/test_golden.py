"""The numbers that the questions about `TimeDistributed` have as answers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdjax
from helpers import integers

KEY = jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shape_and_count(module, shape, batch=6):
    """Output shape without the batch, and number of parameters."""
    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    y, variables = jax.eval_shape(lambda x: module.init_with_output(KEY, x), x)
    assert y.shape[0] == batch
    return y.shape[1:], count(variables["params"])


def both(layer):
    return [layer, tdjax.linen.TimeDistributed(layer)]


@pytest.mark.parametrize("module", both(nn.Dense(5)))
def test_dense_5_on_50_10(module):
    assert shape_and_count(module, (50, 10)) == ((50, 5), 55)


@pytest.mark.parametrize("module", both(nn.Dense(10)))
def test_dense_10_on_20_5(module):
    assert shape_and_count(module, (20, 5)) == ((20, 10), 60)


@pytest.mark.parametrize("module", both(nn.Dense(4)))
def test_dense_4_on_2_3(module):
    assert shape_and_count(module, (2, 3))[0] == (2, 4)


def test_time_distributed_dense_2_on_3_4_is_a_tensordot():
    model = tdjax.linen.TimeDistributed(nn.Dense(2))
    assert shape_and_count(model, (3, 4)) == ((3, 2), 10)
    x = jnp.abs(integers(0, 2, 3, 4)) + 1.0  # 1..5, and a zero:
    x = x.at[0, 0, 0].set(0)
    kernel = integers(1, 4, 2)
    y = model.apply({"params": {"kernel": kernel, "bias": jnp.zeros(2)}}, x)
    want = np.tensordot(np.asarray(x), np.asarray(kernel), [[2], [0]])
    np.testing.assert_array_equal(y, want)


def test_dense_8_then_32_on_32_10_16():
    wrap = tdjax.linen.TimeDistributed
    first, second = wrap(nn.Dense(8)), wrap(nn.Dense(32))
    assert shape_and_count(first, (10, 16), batch=32)[0] == (10, 8)
    assert shape_and_count(second, (10, 8), batch=32)[0] == (10, 32)


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_convolution_of_frames(method):
    conv = nn.Conv(64, (3, 3), padding="VALID")
    model = tdjax.linen.TimeDistributed(conv, method=method)
    assert shape_and_count(model, (10, 299, 299, 3))[0] == (10, 297, 297, 64)


@pytest.mark.parametrize("head", both(nn.Dense(15)))
def test_a_gru_with_a_head_on_every_state(head):
    model = nn.Sequential([nn.RNN(nn.GRUCell(16)), head])
    shape, _ = shape_and_count(model, (64, 15))
    assert shape == (64, 15)
    assert shape_and_count(head, (64, 16)) == ((64, 15), 255)


def test_a_gru_with_a_head_on_its_last_state():
    model = nn.Sequential([nn.RNN(nn.GRUCell(16)), lambda h: h[:, -1], nn.Dense(8)])
    assert shape_and_count(model, (64, 15))[0] == (8,)


def test_a_simple_rnn_on_700_steps():
    rnn = nn.RNN(nn.SimpleCell(200))
    assert shape_and_count(rnn, (700, 1))[0] == (700, 200)
    head = tdjax.linen.TimeDistributed(nn.Dense(1))
    assert shape_and_count(nn.Sequential([rnn, head]), (700, 1))[0] == (700, 1)


FAMILIES = {
    "shared": (20, lambda: tdjax.init_dense(KEY, 3, 5), nn.Dense(5)),
    "flattened": (
        260,
        lambda: tdjax.init_flatten_dense(KEY, 4, 3, 5),
        tdjax.linen.FlattenDense(5),
    ),
    "own weights per step": (
        80,
        lambda: tdjax.init_per_step_dense(KEY, 4, 3, 5),
        tdjax.linen.PerStepDense(5),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_the_three_families(family):
    want, init, module = FAMILIES[family]
    assert count(init()) == want
    assert shape_and_count(module, (4, 3)) == ((4, 5), want)


X = [
    [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]],
    [[3, 1, 7], [8, 2, 5], [11, 10, 4], [9, 6, 12]],
]
KERNEL = [
    [0.1, 0.2, 0.3, 0.4, 0.5],
    [0.2, 0.7, 0.9, 0.1, 0.2],
    [0.1, 0.8, 0.6, 0.2, 0.4],
]
BIAS = [0.1, 0.3, 0.7, 0.8, 0.4]


@pytest.mark.parametrize("jit", [False, True])
def test_dense_minus_time_distributed_dense_is_zero(jit):
    x, params = (
        jnp.float32(X),
        {"kernel": jnp.float32(KERNEL), "bias": jnp.float32(BIAS)},
    )
    wrapped = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
    difference = lambda params, x: tdjax.dense(params, x) - wrapped(params, x)
    zero = (jax.jit(difference) if jit else difference)(params, x)
    np.testing.assert_array_equal(zero, np.zeros((2, 4, 5)))
    row = wrapped(params, x)[0, 0]
    np.testing.assert_allclose(row, [0.9, 4.3, 4.6, 2.0, 2.5], rtol=1e-6)
    model = tdjax.linen.TimeDistributed(nn.Dense(5))
    np.testing.assert_array_equal(
        model.apply({"params": params}, x) - nn.Dense(5).apply({"params": params}, x),
        zero,
    )


def influence(module, timesteps=4, features=3):
    x = jnp.ones((2, timesteps, features))
    variables = module.init(KEY, x)
    return tdjax.step_influence(lambda x: module.apply(variables, x), x)


def test_step_influence_of_families_and_rnns():
    gru = lambda: nn.RNN(nn.GRUCell(5))
    everything = np.ones((4, 4), bool)
    np.testing.assert_array_equal(influence(nn.Dense(5)), np.eye(4))
    np.testing.assert_array_equal(influence(tdjax.linen.PerStepDense(5)), np.eye(4))
    np.testing.assert_array_equal(influence(tdjax.linen.FlattenDense(5)), everything)
    np.testing.assert_array_equal(influence(gru()), np.tril(everything))
    np.testing.assert_array_equal(influence(nn.Bidirectional(gru(), gru())), everything)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_time_distributed_dropout(framework):
    rate, ones = 0.25, jnp.ones((16, 8, 64))
    if framework == "linen":
        model = tdjax.linen.TimeDistributed(nn.Dropout(rate, deterministic=False))
        y = model.apply({}, ones, rngs={"dropout": KEY})
    else:
        y = tdjax.nnx.TimeDistributed(nnx.Dropout(rate, rngs=nnx.Rngs(0)))(ones)
    assert y.shape == ones.shape
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    assert float(jnp.mean(y == 0)) == pytest.approx(rate, abs=0.02)
    drops = np.asarray(y == 0)
    assert all((drops[:, t] != drops[:, 0]).any() for t in range(1, 8))
