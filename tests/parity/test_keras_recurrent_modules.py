"""What the recurrent modules promise beyond parity: noise, masks, programs, errors."""

import pickle

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from helpers import assert_trees_close, assert_trees_equal, normal, x64
from parity.keras_parity import score
from parity.recurrent_layers import (
    FEATURES,
    LAYERS,
    MASK,
    UNITS,
    X,
    convert,
    each_layer,
)
from tdjax._keras.modules.recurrent import GRU, LSTM, SimpleRNN


@each_layer
def test_masked_nan_reaches_no_output_and_no_gradient(kind):
    module, variables = convert(LAYERS[kind](UNITS, return_sequences=True))
    run = lambda variables, x: score(module.apply(variables, x, mask=MASK))
    clean = jax.value_and_grad(run, (0, 1))(variables, jnp.where(MASK[..., None], X, 0))
    dirty = jnp.where(MASK[..., None], X, jnp.nan)
    assert_trees_close(jax.value_and_grad(run, (0, 1))(variables, dirty), clean, 0, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(params, x):
    w, r, b = (
        np.asarray(params[k], np.float64)
        for k in ("kernel", "recurrent_kernel", "bias")
    )
    h, c = np.zeros((2, len(x), len(r)))
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ w + b + h @ r, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def numpy_gru(params, x):
    w, r, b = (
        np.asarray(params[k], np.float64)
        for k in ("kernel", "recurrent_kernel", "bias")
    )
    h = np.zeros((len(x), len(r)))
    outputs = []
    for t in range(x.shape[1]):
        xz, xr, xh = np.split(x[:, t] @ w + b[0], 3, axis=1)
        hz, hr, hh = np.split(h @ r + b[1], 3, axis=1)
        z = sigmoid(xz + hz)
        h = z * h + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh)
        outputs.append(h)
    return np.stack(outputs, axis=1)


@pytest.mark.parametrize(("layer", "referee"), [(LSTM, numpy_lstm), (GRU, numpy_gru)])
def test_layer_is_the_loop_in_numpy(layer, referee, key):
    with x64():
        x = normal(3, 2, 6, FEATURES, dtype=jnp.float64)
        module = layer(UNITS, return_sequences=True, param_dtype=jnp.float64)
        variables = module.init(key, x)
        variables = jax.tree.map(lambda v: v + 0.1, variables)
        got = module.apply(variables, x)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(
            got, referee(variables["params"], np.asarray(x)), 1e-12
        )
        single = jax.tree.map(lambda v: v.astype(jnp.float32), variables)
        got = layer(UNITS, return_sequences=True).apply(single, x.astype(jnp.float32))
        np.testing.assert_allclose(
            got, referee(single["params"], np.asarray(x)), 1e-5, 1e-6
        )


@each_layer
def test_product_before_the_loop_is_the_one_in_it(kind, key, monkeypatch):
    noise = {"dropout": 0.4, "recurrent_dropout": 0.3}
    layer = LAYERS[kind](UNITS, return_sequences=True, **noise)
    module, variables = convert(layer)

    def run(variables, x):
        rngs = {"dropout": key}
        return score(module.apply(variables, x, mask=MASK, train=True, rngs=rngs))

    results = []
    for before in (False, True):
        choose = lambda *args, cpu, default, before=before: (
            default(*args) if before else cpu(*args)
        )
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        results.append(jax.value_and_grad(run, (0, 1))(variables, X))
    assert_trees_close(*results, 1e-5, 1e-5)


@each_layer
def test_what_flax_captures_is_no_value_of_a_step(kind):
    module, variables = convert(LAYERS[kind](UNITS))
    capture = {"capture_intermediates": lambda module, name: True}
    y, captured = module.apply(variables, X, mutable=["intermediates"], **capture)
    (call,) = captured["intermediates"]["__call__"]
    assert_trees_equal(call, y)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(captured))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_one_product_for_all_steps_is_only_for_accelerators(platform):
    module, variables = convert(keras.layers.GRU(UNITS))
    x = jnp.ones((2, 41, X.shape[-1]))
    run = jax.jit(lambda x: module.apply(variables, x))
    text = jax.export.export(run, platforms=[platform])(x).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 2
    of_all_steps = [line for line in products if "-> tensor<41x2x" in line]
    assert len(of_all_steps) == (platform != "cpu")


def test_gru_16_on_15_features_has_1536_parameters(key):
    x = jnp.ones((1, 64, 15))
    layer = keras.layers.GRU(16, reset_after=False)
    module, variables = convert(layer, x)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(variables) == layer.count_params() == 1536
    own = jax.eval_shape(module.init, key, x)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, variables)
    assert count(module.clone(reset_after=True).init(key, x)) == 1584


@each_layer
def test_initial_parameters_have_the_tree_of_the_converted(kind, key):
    module, variables = convert(LAYERS[kind](UNITS))
    own = module.init(key, X)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, variables)


@each_layer
def test_module_is_pickled_and_hashed(kind):
    layer = keras.layers.Bidirectional(LAYERS[kind](UNITS))
    module, variables = convert(layer)
    again = pickle.loads(pickle.dumps(module))
    assert again == module
    assert hash(again) == hash(module)
    assert_trees_close(again.apply(variables, X), module.apply(variables, X), 0, 0)


@each_layer
def test_compiled_program_does_not_grow_with_the_steps(kind):
    module, variables = convert(LAYERS[kind](UNITS))
    grad = jax.grad(lambda variables, x: score(module.apply(variables, x)))
    operations = lambda steps: str(
        jax.make_jaxpr(grad)(variables, X[:, :1].repeat(steps, 1))
    ).count(" = ")
    assert operations(3) == operations(300)


class TestDropout:
    """The noise, seen through layers that hand their inputs on."""

    def noise_of_inputs(self, rngs, **options):
        module = SimpleRNN(4, activation=lambda x: x, return_sequences=True, **options)
        params = {
            "kernel": jnp.eye(4),
            "recurrent_kernel": jnp.zeros((4, 4)),
            "bias": jnp.zeros(4),
        }
        x = jnp.ones((50, 3, 4))
        train = rngs is not None
        return module.apply({"params": params}, x, train=train, rngs=rngs)

    def test_none_at_inference(self):
        assert (self.noise_of_inputs(None, dropout=0.5) == 1).all()

    def test_same_at_all_steps_and_other_for_each_example(self, key):
        y = self.noise_of_inputs({"dropout": key}, dropout=0.5)
        assert set(np.unique(y)) == {0, 2}
        assert (y == y[:, :1]).all()
        assert len(np.unique(y[:, 0], axis=0)) > 5
        assert 0.35 < (y == 0).mean() < 0.65

    def test_state_drops_the_same_at_all_steps(self, key):
        module = SimpleRNN(
            4, activation=lambda x: x, return_sequences=True, recurrent_dropout=0.5
        )
        params = {
            "kernel": jnp.zeros((1, 4)),
            "recurrent_kernel": jnp.eye(4),
            "bias": jnp.zeros(4),
        }
        y = module.apply(
            {"params": params},
            jnp.ones((50, 3, 1)),
            initial_state=jnp.ones((50, 4)),
            train=True,
            rngs={"dropout": key},
        )
        assert set(np.unique(y[:, 0])) == {0, 2}
        assert_trees_close(y[:, 2], y[:, 0] * 4, 0, 0)

    @pytest.mark.parametrize(
        ("layer", "gates", "shared", "own"),
        [(LSTM, 4, {0, 32}, {0, 8, 16, 32}), (GRU, 3, {0, -6}, {0, -2, -6})],
    )
    @pytest.mark.parametrize(
        "options",
        [{}, {"implementation": 1}, {"recurrent_dropout": 0.5}],
        ids=lambda options: ",".join(options) or "plain",
    )
    def test_each_gate_has_noise_of_its_own_where_keras_has_it(
        self, layer, gates, shared, own, options, key
    ):
        # The gates are 2 plus their noise, the candidate is its noise: 0 or 2.
        acts = {"activation": lambda x: x, "recurrent_activation": lambda x: x + 2}
        module = layer(1, use_bias=False, dropout=0.5, **acts, **options)
        params = {
            "kernel": jnp.ones((1, gates)),
            "recurrent_kernel": jnp.zeros((1, gates)),
        }
        x = jnp.ones((300, 1, 1))
        y = module.apply({"params": params}, x, train=True, rngs={"dropout": key})
        assert set(np.unique(y)) == (own if options else shared)

    @pytest.mark.slow
    @each_layer
    def test_mean_over_noise_is_that_of_keras(self, kind, key):
        options = {"dropout": 0.4, "recurrent_dropout": 0.3}
        layer = LAYERS[kind](UNITS, seed=3, **options)
        module, variables = convert(layer)
        x = jnp.repeat(X[:1], 8000, axis=0)
        got = module.apply(variables, x, train=True, rngs={"dropout": key})
        want = layer(x, training=True)
        assert jnp.std(got, axis=0).min() > 0.02
        np.testing.assert_allclose(got.mean(0), want.mean(0), atol=0.02)
        np.testing.assert_allclose(
            jnp.std(got, axis=0), jnp.std(want, axis=0), atol=0.02
        )


class TestErrors:
    def test_stateful_layer_is_refused_by_name(self):
        layer = keras.layers.GRU(UNITS, stateful=True, name="memory")
        with pytest.raises(ValueError, match=r"'memory' \(GRU\).*stateful=True"):
            convert(layer)

    def test_unknown_cell_is_refused_by_name(self):
        class Cell(keras.layers.GRUCell):
            pass

        with pytest.raises(ValueError, match=r"its cell is a Cell; known are GRUCell"):
            convert(keras.layers.RNN(Cell(UNITS)))

    def test_layer_with_another_loop_is_refused(self):
        class Slow(keras.layers.LSTM):
            def inner_loop(self, *args, **kwargs):
                return super().inner_loop(*args, **kwargs)

        with pytest.raises(TypeError, match="No rule is known for layer 'slow'"):
            convert(Slow(UNITS))

    def test_cell_of_another_dtype_is_refused(self):
        cell = keras.layers.GRUCell(UNITS, dtype="float32")
        with pytest.raises(ValueError, match="computes in bfloat16, that of its cell"):
            convert(keras.layers.RNN(cell, dtype="bfloat16"))

    def test_inner_layer_of_bidirectional_is_named_with_its_place(self):
        layer = keras.layers.Bidirectional(
            keras.layers.GRU(UNITS, stateful=True, name="memory"), name="both"
        )
        with pytest.raises(
            ValueError, match=r"'forward_memory'.*forward_layer of 'both'"
        ):
            convert(layer)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"sequences": X[None]},
                r"\(batch, time, features\), got float32\[1,4,4,3\]",
            ),
            (
                {"mask": MASK[:, :2]},
                r"mask must have shape .*\(4, 4\), got bool\[4,2\]",
            ),
            (
                {"initial_state": X[:, 0]},
                r"initial_state must be 1 .* \(4, 2\), got float32\[4,3\]",
            ),
        ],
    )
    def test_input_of_another_shape_is_named(self, options, message, key):
        options = {"sequences": X, **options}
        with pytest.raises(ValueError, match=message):
            GRU(UNITS).init(key, **options)
