"""The drop-in beside Keras' own layer: the same numbers, state, noise and losses."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_pairs import (
    ALONE,
    BATCH,
    OTHERS,
    STEPS,
    assert_alike,
    assert_close,
    normal,
    pair,
)
from tdjax.keras import TimeDistributed

BLOCKS = [
    {"method": "vmap", "chunk_size": 3},
    {"method": "vmap", "chunk_size": 1, "remat": True},
    {"method": "vmap", "chunk_size": 2, "unroll": True},
    {"method": "fold", "chunk_size": 3, "remat": True},
]


@pytest.mark.parametrize("method", ["vmap", "fold"])
@pytest.mark.parametrize("name", ALONE)
def test_layers_that_treat_examples_alone_are_keras_own_loop(name, method):
    make, shape = ALONE[name]
    x = normal(0, BATCH, STEPS, *shape)
    assert_alike(*pair(make, shape, method=method), x, training=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_layers_with_state_and_noise_are_keras_own_loop(name, training):
    make, shape = OTHERS[name]
    x = normal(0, BATCH, STEPS, *shape)
    assert_alike(*pair(make, shape), x, training=training)


@pytest.mark.parametrize("options", BLOCKS)
@pytest.mark.parametrize("name", ["dense", "dropout", "batch_norm", "spectral_norm"])
def test_blocks_of_steps_change_nothing(name, options):
    make, shape = (ALONE | OTHERS)[name]
    if options["method"] == "fold" and name != "dense":
        pytest.skip("not equal to a loop over steps")
    x = normal(0, BATCH, STEPS, *shape)
    assert_alike(*pair(make, shape, **options), x, training=True)


class Centred(layers.Layer):
    """It looks at other examples."""

    def call(self, x):
        return x - ops.mean(x, axis=0)

    def compute_output_shape(self, input_shape):
        return input_shape


def model_with_a_constant():
    inputs = keras.Input((4,))
    constant = np.ones((BATCH, 2), "float32")
    return keras.Model(inputs, layers.Add()([layers.Dense(2)(inputs), constant]))


def custom(x):
    return x - ops.mean(x, axis=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Dense(3, activation=custom),
        lambda: keras.Sequential([layers.Dense(3), Centred()]),
        lambda: layers.Softmax(),
        lambda: layers.LayerNormalization(axis=-2),
        lambda: keras.Sequential([layers.Dense(1), layers.Reshape(())]),
        lambda: TimeDistributed(layers.Dense(2), activity_regularizer="l2"),
        lambda: model_with_a_constant(),
        lambda: layers.Concatenate(axis=0),
        lambda: TimeDistributed(layers.BatchNormalization()),
        lambda: layers.Dense(3, activity_regularizer="l2"),
        *(make for make, _ in OTHERS.values()),
    ],
)
def test_what_may_not_be_folded_is_not_folded_by_itself(make):
    assert TimeDistributed(make()).lowering().method == "vmap"


@pytest.mark.parametrize("make", [make for make, _ in ALONE.values()])
def test_what_may_be_folded_is(make):
    assert TimeDistributed(make()).lowering().method == "fold"
    assert TimeDistributed(make(), share_rng=True).lowering().method == "vmap"


def test_a_functional_model_with_operations_is_not_folded_by_itself():
    inputs = keras.Input((4,))
    outputs = layers.Dense(2)(inputs)
    step = keras.Model(inputs, outputs - ops.mean(outputs, axis=0, keepdims=True))
    theirs, ours = pair(lambda: step, (4,))
    assert ours.lowering().method == "vmap"
    x = normal(0, BATCH, STEPS, 4)
    assert_close([ours(x)], [theirs(x)])


# State and noise


def test_fold_takes_statistics_over_batch_and_time_and_moves_them_once():
    make = lambda: layers.BatchNormalization(momentum=0.8)
    _, ours = pair(make, (6,), method="fold")
    plain = make()
    plain.build((None, 6))
    for mine, yours in zip(plain.variables, ours.variables):
        mine.assign(yours)
    x = normal(0, BATCH, STEPS, 6)
    wanted = plain(x.reshape(-1, 6), training=True)
    assert_close([ours(x, training=True)], [np.reshape(wanted, x.shape)])
    assert_close(ours.variables, plain.variables)


def test_fold_refuses_what_it_would_get_wrong():
    x = normal(0, BATCH, STEPS, 6)
    _, ours = pair(*OTHERS["batch_norm"], method="fold", chunk_size=2)
    with pytest.raises(
        ValueError, match="chunk_size=2 needs a layer that writes to no"
    ):
        ours(x, training=True)
    ours(x, training=False)
    _, ours = pair(*OTHERS["norm_and_noise"], method="fold")
    with pytest.raises(ValueError, match="so the losses that it adds would differ"):
        ours(x, training=True)
    with pytest.raises(ValueError, match="share_rng=True needs method='vmap'"):
        TimeDistributed(layers.Dropout(0.5), method="fold", share_rng=True)


def test_shared_noise_is_that_of_the_first_step_and_new_in_each_call():
    _, ours = pair(*OTHERS["dropout"], share_rng=True)
    plain = layers.Dropout(0.5, seed=3)
    x = np.ones((BATCH, STEPS, 6), "float32")
    seen = []
    for _ in range(2):
        step = ops.convert_to_numpy(plain(x[:, 0], training=True))
        y = ops.convert_to_numpy(ours(x, training=True))
        np.testing.assert_array_equal(y, np.repeat(step[:, None], STEPS, 1))
        seen.append(y)
    assert (seen[0] != seen[1]).any()


class Counting(layers.Layer):
    """A metric, a counter, and a loss that a call adds."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = keras.metrics.Mean()
        self.calls = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )

    def call(self, x):
        self.mean.update_state(x)
        self.calls.assign(self.calls + 1)
        self.add_loss(0.1 * ops.sum(x))
        return x * 2.0

    def compute_output_shape(self, input_shape):
        return input_shape


def test_metrics_counters_and_losses_see_every_step():
    theirs, ours = pair(Counting, (6,))
    x = normal(0, BATCH, STEPS, 6)
    assert_alike(theirs, ours, x)
    assert int(ours.layer.calls.value) == 2 * STEPS
    assert_close([ours.layer.mean.result()], [x.mean()])


def test_the_wrapped_layers_activity_regulariser_counts_for_each_step():
    ours = TimeDistributed(layers.Dense(2, activity_regularizer="l2"))
    x = normal(0, BATCH, STEPS, 6)
    y = ops.convert_to_numpy(ours(x))
    assert_close([sum(ours.losses)], [0.01 * (y**2).sum() / BATCH])


def test_a_write_to_a_variable_of_somebody_else_is_an_error():
    strange = keras.Variable(0.0)

    class Writes(layers.Layer):
        def call(self, x):
            strange.assign(1.0)
            return x

        def compute_output_shape(self, input_shape):
            return input_shape

    with pytest.raises(ValueError, match="must write to its own variables only"):
        TimeDistributed(Writes())(normal(0, 2, 3, 4))
    assert float(strange.value) == 0.0


# Shapes, inputs and outputs


def test_symbolic_shapes_and_dtypes():
    video = keras.Input((10, 299, 299, 3), batch_size=32)
    y = TimeDistributed(layers.Conv2D(64, (3, 3)))(video)
    assert y.shape == (32, 10, 297, 297, 64)
    y = TimeDistributed(layers.Dense(8))(keras.Input((None, 16)))
    assert y.shape == (None, None, 8)
    tokens = keras.Input((None, 7), dtype="int32")
    assert TimeDistributed(layers.Masking())(keras.Input((5, 3, 2))).dtype == "float32"
    assert TimeDistributed(layers.Flatten())(tokens).dtype == "int32"
    layer = TimeDistributed(layers.Dense(8))
    assert layer.compute_output_shape((2, 3, 4)) == (2, 3, 8)


class Attend(layers.Layer):
    """Two inputs, two outputs, and neither a build nor an output shape of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape[0])

    def call(self, inputs):
        query, words = inputs
        scores = ops.softmax(ops.einsum("bf,bwf->bw", self.dense(query), words))
        return {"scores": scores, "sum": ops.einsum("bw,bwf->bf", scores, words)}


@pytest.mark.parametrize("options", [{}, {"method": "fold", "chunk_size": 3}])
def test_several_inputs_and_outputs(options):
    query, words = normal(0, BATCH, STEPS, 5), normal(1, BATCH, STEPS, 6, 3)
    step = Attend()
    layer = TimeDistributed(step, **options)
    symbolic = layer([keras.Input((STEPS, 5)), keras.Input((None, 6, 3))])
    assert symbolic["scores"].shape == (None, STEPS, 6)
    y = layer([query, words])
    for t in range(STEPS):
        wanted = step([query[:, t], words[:, t]])
        got = {name: value[:, t] for name, value in y.items()}
        assert_close(got.values(), [wanted[name] for name in got])


def test_a_model_of_two_inputs_inside_a_model_trains():
    a, b = keras.Input((4,)), keras.Input((2,))
    step = keras.Model([a, b], layers.Add()([layers.Dense(3)(a), layers.Dense(3)(b)]))
    inputs = [keras.Input((None, 4)), keras.Input((None, 2))]
    model = keras.Model(inputs, TimeDistributed(step)(inputs))
    model.compile("sgd", "mse")
    x = [normal(0, BATCH, STEPS, 4), normal(1, BATCH, STEPS, 2)]
    y = normal(2, BATCH, STEPS, 3)
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=20, verbose=0)
    assert model.evaluate(x, y, verbose=0) < before


def test_no_steps_and_no_examples():
    layer = TimeDistributed(layers.BatchNormalization())
    assert layer(np.zeros((2, 0, 3), "float32"), training=True).shape == (2, 0, 3)
    np.testing.assert_array_equal(layer.layer.moving_mean.value, np.zeros(3))
    assert layer(np.zeros((0, 2, 3), "float32")).shape == (0, 2, 3)


def test_unknown_lengths_in_fit_and_predict():
    model = keras.Sequential(
        [
            keras.Input((None, 2)),
            layers.Conv1D(4, 3, padding="same"),
            layers.LSTM(4, return_sequences=True),
            layers.Conv1DTranspose(3, 3, padding="same"),
            TimeDistributed(layers.Dense(1)),
        ]
    )
    model.compile("adam", "mse")
    for steps in (4, 7):
        x = normal(0, BATCH, steps, 2)
        model.fit(x, x[..., :1], verbose=0)
        assert model.predict(x, verbose=0).shape == (BATCH, steps, 1)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_dtype_policies_are_those_of_keras(policy):
    policies = keras.dtype_policies.DTypePolicy(policy)
    make = lambda: keras.Sequential(
        [layers.Dense(4, dtype=policies), layers.BatchNormalization(dtype=policies)]
    )
    theirs = layers.TimeDistributed(make(), dtype=policies)
    ours = TimeDistributed(make(), dtype=policies)
    x = normal(0, BATCH, STEPS, 6)
    for layer in (theirs, ours):
        layer.build(x.shape)
    ours.set_weights(theirs.get_weights())
    y, wanted = ours(x, training=True), theirs(x, training=True)
    assert y.dtype == wanted.dtype
    assert ours.compute_output_spec(keras.KerasTensor(x.shape)).dtype == y.dtype
    to_numpy = lambda v: np.asarray(v, "float32")
    np.testing.assert_allclose(to_numpy(y), to_numpy(wanted), atol=0.05)
    for a, b in zip(ours.variables, theirs.variables):
        assert a.value.dtype == b.value.dtype
        np.testing.assert_allclose(to_numpy(a.value), to_numpy(b.value), atol=0.02)


class Counter(layers.Layer):
    """What it writes depends on nothing but what it wrote."""

    def build(self, input_shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.count.assign(self.count + 1)
        return x

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a_counter_counts_the_steps():
    ours = TimeDistributed(Counter())
    ours(normal(0, BATCH, STEPS, 6))
    assert float(ours.layer.count.value) == STEPS


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(ops.sum(x**2))
        return x

    def compute_output_shape(self, input_shape):
        return input_shape


def nested_loss(wrap):
    """A layer that adds a loss, by itself and then wrapped, in a model in a model."""
    inner, outer = keras.Input((STEPS, 2)), keras.Input((STEPS, 2))
    layer = AddsLoss()
    model = keras.Model(inner, wrap(layer)(layer(inner)))
    model = keras.Model(outer, model(outer))
    model.compile("sgd", "mse")
    x = np.ones((BATCH, STEPS, 2), "float32")
    return model.evaluate(x, x, verbose=0)


def test_losses_of_calls_before_the_wrapped_one_are_kept():
    wanted = nested_loss(layers.TimeDistributed)
    assert wanted > 0
    assert nested_loss(TimeDistributed) == pytest.approx(wanted)
