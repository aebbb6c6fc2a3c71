"""Keras' recurrent layers against Keras itself and a float64 loop in NumPy."""

import functools
import pickle

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import tdjax._keras_recurrent_rules  # noqa: F401
from conftest import assert_trees_close, normal, x64
from tdjax import _keras_recurrent
from tdjax._keras_recurrent import GRU, LSTM, SimpleRNN
from tdjax._keras_registry import convert_layer

BATCH, TIME, FEATURES, UNITS = 4, 4, 3, 2
X = normal(0, BATCH, TIME, FEATURES)
# Full, ragged, with holes from the first step on, and without a valid step.
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
LAYERS = {
    "SimpleRNN": keras.layers.SimpleRNN,
    "LSTM": keras.layers.LSTM,
    "GRU": keras.layers.GRU,
    "GRU v1": functools.partial(keras.layers.GRU, reset_after=False),
}
STATES = {"SimpleRNN": 1, "LSTM": 2, "GRU": 1, "GRU v1": 1}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def build(layer, x=X):
    """With weights that are none of them zero."""
    layer.build(x.shape)
    for place, weight in enumerate(layer.weights):
        weight.assign(0.5 * normal(place, *weight.shape))
    return layer


def convert(layer):
    module, tree = convert_layer(layer)
    return module, tree, jax.tree.map(lambda variable: variable.value, tree)


def score(outputs):
    """Weighs every number of every output differently."""
    leaves = jax.tree.leaves(outputs)
    return sum(
        jnp.sum(jnp.sin(i + 1 + jnp.arange(y.size)) * y.ravel() ** 2 + y.ravel())
        for i, y in enumerate(leaves)
    )


def assert_parity(layer, x=X, **kwargs):
    """Same outputs; same gradients by weights, inputs and what else is floating."""
    module, tree, variables = convert(layer)
    kept = [variable.value for variable in layer.non_trainable_variables]
    given = {name: value for name, value in kwargs.items() if name != "mask"}
    mask = kwargs.get("mask")

    def of_keras(trainable, x, given):
        y, _ = layer.stateless_call(trainable, kept, x, mask=mask, **given)
        return score(y), y

    def of_flax(variables, x, given):
        y = module.apply(variables, x, mask=mask, **given)
        return score(y), y

    run = lambda loss: jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    trainable = [variable.value for variable in layer.trainable_variables]
    (by_weight, *want), y = run(of_keras)(trainable, x, given)
    (by_variable, *got), own_y = run(of_flax)(variables, x, given)
    assert_trees_close(jax.tree.leaves(own_y), jax.tree.leaves(y), 1e-5, 1e-6)
    places = {id(v): i for i, v in enumerate(layer.trainable_variables)}
    wanted = jax.tree.map(lambda variable: by_weight[places[id(variable)]], tree)
    assert_trees_close((by_variable, *got), (wanted, *want), 1e-5, 1e-5)
    return own_y


@each_layer
@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({}, True),
        ({"return_sequences": True}, False),
        ({"return_sequences": True, "return_state": True, "go_backwards": True}, True),
        ({"go_backwards": True, "use_bias": False}, False),
        ({"return_sequences": True, "zero_output_for_mask": True}, True),
        ({"return_state": True, "zero_output_for_mask": True}, True),
        ({"unroll": True, "go_backwards": True}, True),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_layer_is_that_of_keras(kind, options, masked):
    layer = build(LAYERS[kind](UNITS, **options))
    assert_parity(layer, mask=MASK if masked else None)


@each_layer
@pytest.mark.parametrize("options", [{}, {"dropout": 0.4, "recurrent_dropout": 0.3}])
def test_product_before_the_loop_is_the_one_in_it(kind, options, key, monkeypatch):
    layer = build(LAYERS[kind](UNITS, return_sequences=True, **options))
    module, _, variables = convert(layer)

    def run(variables, x):
        rngs = {"dropout": key}
        return score(module.apply(variables, x, mask=MASK, train=True, rngs=rngs))

    results = []
    for before in (False, True):
        monkeypatch.setattr(
            _keras_recurrent, "is_faster_before_the_loop", lambda before=before: before
        )
        results.append(jax.value_and_grad(run, (0, 1))(variables, X))
    assert_trees_close(*results, 1e-5, 1e-5)


@each_layer
@pytest.mark.parametrize("unroll", [False, True])
def test_initial_state_is_that_of_keras_also_before_the_first_valid_step(kind, unroll):
    layer = build(LAYERS[kind](UNITS, return_sequences=True, unroll=unroll))
    states = [normal(7 + i, BATCH, UNITS) for i in range(STATES[kind])]
    assert_parity(layer, mask=MASK, initial_state=states)
    last = build(LAYERS[kind](UNITS, unroll=unroll, return_state=True))
    assert_parity(last, mask=MASK, initial_state=states)


@each_layer
def test_activations_are_those_of_keras(kind):
    gates = {} if kind == "SimpleRNN" else {"recurrent_activation": "hard_sigmoid"}
    assert_parity(build(LAYERS[kind](UNITS, activation="softmax", **gates)))


@pytest.mark.parametrize("kind", ["GRU", "GRU v1", "LSTM"])
def test_recurrent_activation_sees_one_gate_at_a_time(kind):
    assert_parity(build(LAYERS[kind](UNITS, recurrent_activation="softmax")))


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "ave", "mul", None])
@pytest.mark.parametrize(
    ("return_sequences", "masked"), [(False, True), (True, False), (True, True)]
)
def test_bidirectional_is_that_of_keras(merge_mode, return_sequences, masked):
    inner = keras.layers.GRU(UNITS, return_sequences=return_sequences)
    layer = build(keras.layers.Bidirectional(inner, merge_mode=merge_mode))
    assert_parity(layer, mask=MASK if masked else None)


@pytest.mark.parametrize("merge_mode", ["concat", None])
def test_bidirectional_takes_and_gives_states_as_keras(merge_mode):
    inner = keras.layers.LSTM(UNITS, return_sequences=True, return_state=True)
    layer = build(keras.layers.Bidirectional(inner, merge_mode=merge_mode))
    states = [normal(7 + i, BATCH, UNITS) for i in range(4)]
    assert_parity(layer, mask=MASK, initial_state=states)


def test_bidirectional_with_another_backward_layer_is_that_of_keras():
    backward = keras.layers.LSTM(3, go_backwards=True, return_sequences=True)
    forward = keras.layers.SimpleRNN(UNITS, return_sequences=True)
    layer = keras.layers.Bidirectional(forward, backward_layer=backward)
    _, _, variables = convert(build(layer))
    assert jax.tree.map(jnp.shape, variables["params"]["backward_layer"]) == {
        "kernel": (FEATURES, 12),
        "recurrent_kernel": (3, 12),
        "bias": (12,),
    }
    assert_parity(layer, mask=MASK)


def test_bidirectional_of_another_dtype_casts_as_keras():
    inner = keras.layers.GRU(UNITS, dtype="float32", return_sequences=True)
    layer = build(keras.layers.Bidirectional(inner, dtype="bfloat16"))
    module, _, variables = convert(layer)
    got, want = module.apply(variables, X), layer(X)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(float), want.astype(float), 1e-2, 1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_rnn_of_a_cell_is_that_of_keras(masked):
    cell = keras.layers.GRUCell(UNITS)
    layer = build(keras.layers.RNN(cell, return_sequences=True, return_state=True))
    assert_parity(layer, mask=MASK if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"return_sequences": True, "return_state": True, "go_backwards": True}],
    ids=["last", "all"],
)
def test_stacked_cells_are_those_of_keras(options, masked):
    cells = [keras.layers.GRUCell(UNITS), keras.layers.LSTMCell(3)]
    layer = build(keras.layers.RNN(cells, **options))
    states = [[normal(7, BATCH, UNITS)], [normal(8, BATCH, 3), normal(9, BATCH, 3)]]
    assert_parity(layer, mask=MASK if masked else None)
    assert_parity(layer, mask=MASK if masked else None, initial_state=states)


@each_layer
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
def test_mask_of_the_output_is_that_of_keras(kind, return_sequences, return_state):
    options = {"return_sequences": return_sequences, "return_state": return_state}
    layer = build(LAYERS[kind](UNITS, **options))
    module, _, _ = convert(layer)
    got, want = module.compute_mask(X, MASK), layer.compute_mask(X, MASK)
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(want)) == return_sequences
    assert (type(got) is tuple) == return_state == (type(want) is list)
    wrapped = keras.layers.Bidirectional(LAYERS[kind](UNITS, **options))
    module, _, _ = convert(build(wrapped))
    got, want = module.compute_mask(X, MASK), wrapped.compute_mask(X, MASK)
    assert (got is None) == (want is None)


@each_layer
def test_masked_nan_reaches_no_output_and_no_gradient(kind):
    module, _, variables = convert(build(LAYERS[kind](UNITS, return_sequences=True)))
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


def test_gru_16_on_15_features_has_1536_parameters(key):
    x = jnp.ones((1, 64, 15))
    layer = keras.layers.GRU(16, reset_after=False)
    module, _, variables = convert(build(layer, x))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(variables) == layer.count_params() == 1536
    own = jax.eval_shape(module.init, key, x)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, variables)
    assert count(module.clone(reset_after=True).init(key, x)) == 1584


@each_layer
def test_initial_parameters_have_the_tree_of_the_converted(kind, key):
    module, _, variables = convert(build(LAYERS[kind](UNITS)))
    own = module.init(key, X)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, variables)


@each_layer
def test_module_is_pickled_and_hashed(kind):
    layer = keras.layers.Bidirectional(LAYERS[kind](UNITS))
    module, _, variables = convert(build(layer))
    again = pickle.loads(pickle.dumps(module))
    assert again == module
    assert hash(again) == hash(module)
    assert_trees_close(again.apply(variables, X), module.apply(variables, X), 0, 0)


@each_layer
def test_bfloat16_policy_is_that_of_keras(kind):
    options = {"dtype": "mixed_bfloat16", "return_sequences": True}
    layer = build(LAYERS[kind](UNITS, **options))
    module, _, variables = convert(layer)
    got, want = module.apply(variables, X, mask=MASK), layer(X, mask=MASK)
    assert got.dtype == want.dtype == jnp.bfloat16
    assert variables["params"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(got.astype(float), want.astype(float), 2e-2, 2e-2)


@each_layer
def test_compiled_program_does_not_grow_with_the_steps(kind):
    module, _, variables = convert(build(LAYERS[kind](UNITS)))
    grad = jax.grad(lambda variables, x: score(module.apply(variables, x)))
    lines = lambda steps: len(
        str(jax.make_jaxpr(grad)(variables, X[:, :1].repeat(steps, 1))).splitlines()
    )
    assert lines(3) == lines(300)


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

    @pytest.mark.parametrize("kind", LAYERS)
    def test_mean_over_noise_is_that_of_keras(self, kind, key):
        options = {"dropout": 0.4, "recurrent_dropout": 0.3}
        layer = build(LAYERS[kind](UNITS, seed=3, **options))
        module, _, variables = convert(layer)
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
            convert(build(layer))

    def test_unknown_cell_is_refused_by_name(self):
        class Cell(keras.layers.GRUCell):
            pass

        with pytest.raises(ValueError, match=r"its cell is a Cell; known are GRUCell"):
            convert(build(keras.layers.RNN(Cell(UNITS))))

    def test_layer_with_another_loop_is_refused(self):
        class Slow(keras.layers.LSTM):
            def inner_loop(self, *args, **kwargs):
                return super().inner_loop(*args, **kwargs)

        with pytest.raises(ValueError, match="overrides inner_loop"):
            convert(build(Slow(UNITS)))

    def test_cell_of_another_dtype_is_refused(self):
        cell = keras.layers.GRUCell(UNITS, dtype="float32")
        with pytest.raises(ValueError, match="computes in bfloat16, that of its cell"):
            convert(build(keras.layers.RNN(cell, dtype="bfloat16")))

    def test_inner_layer_of_bidirectional_is_named_with_its_place(self):
        layer = keras.layers.Bidirectional(
            keras.layers.GRU(UNITS, stateful=True, name="memory"), name="both"
        )
        with pytest.raises(
            ValueError, match=r"'forward_memory'.*forward_layer of 'both'"
        ):
            convert(build(layer))

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
