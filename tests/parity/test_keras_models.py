"""The drop-in in models: masks, bad input, files, and taking Keras' layer's place."""

import jax
import keras
import numpy as np
import pytest
from keras import layers, ops

import tdjax
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
from tdjax.keras import TimeDistributed, replace_time_distributed

# Masks


class Weighted(layers.Layer):
    """It takes its mask into its numbers."""

    supports_masking = True

    def call(self, x, mask=None):
        return x if mask is None else x * ops.cast(mask, x.dtype)[:, None]

    def compute_output_shape(self, input_shape):
        return input_shape


def test_the_wrapped_layer_gets_its_steps_part_of_the_mask():
    mask = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]], bool)
    x = normal(0, BATCH, STEPS, 6)
    theirs, ours = pair(Weighted, (6,))
    assert_close([ours(x, mask=mask)], [theirs(x, mask=mask)])
    assert_close([ours(x, mask=mask)], [x * mask[..., None]])
    theirs, ours = pair(*OTHERS["batch_norm"])
    assert_alike(theirs, ours, x, mask=mask, training=True)


@pytest.mark.parametrize("options", [{}, {"method": "vmap"}])
def test_a_longer_mask_reaches_a_recurrent_layer_over_words(options):
    mask = np.random.default_rng(0).random((BATCH, STEPS, 5)) > 0.4
    theirs, ours = pair(*ALONE["lstm"], **options)
    x = normal(0, BATCH, STEPS, 5, 2)
    assert_close([ours(x, mask=mask)], [theirs(x, mask=mask)])


def test_words_and_sentences_masked_by_zeros():
    """Keras' own layer hands the mask of words on to the layer over sentences."""
    tokens = np.array(
        [[[1, 2, 0], [3, 0, 0], [0, 0, 0]], [[4, 0, 0], [0, 0, 0], [5, 6, 7]]]
    )
    inputs = keras.Input((None, 3), dtype="int32")
    embedded = layers.Embedding(8, 4, mask_zero=True)(inputs)
    sentences = TimeDistributed(layers.LSTM(5))(embedded)
    document = layers.LSTM(6)
    model = keras.Model(inputs, document(sentences))
    steps = keras.Model(inputs, sentences)(tokens)
    mask = np.array([[True, True, False], [True, False, True]])
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(steps), mask)
    assert_close([model(tokens)], [document(ops.convert_to_numpy(steps), mask=mask)])


def test_a_mask_goes_on_as_far_as_the_output_has_room():
    layer, mask = TimeDistributed(layers.Dense(2)), np.ones((2, 3, 4), bool)
    compute = lambda layer, *shape: layer.compute_mask(np.zeros(shape, "float32"), mask)
    assert compute(layer, 2, 3, 4, 5).shape == (2, 3, 4)
    assert compute(layer, 2, 3, 5).shape == (2, 3)
    assert compute(TimeDistributed(layers.Conv1D(2, 2)), 2, 3, 4, 5).shape == (2, 3)
    assert layer.compute_mask(np.zeros((2, 3, 5)), None) is None
    plain = np.ones((2, 3), bool)
    assert layer.compute_mask(np.zeros((2, 3, 5)), plain) is plain


def test_embedding_masks_weigh_the_loss_in_fit():
    def build(wrapper):
        keras.utils.set_random_seed(0)
        embedding = layers.Embedding(10, 5, mask_zero=True)
        head = wrapper(layers.Dense(4, activation="softmax"))
        model = keras.Sequential([keras.Input((6,)), embedding, head])
        loss = "sparse_categorical_crossentropy"
        model.compile("sgd", loss, metrics=["accuracy"])
        return model

    x = np.random.default_rng(0).integers(0, 10, (8, 6))
    y = np.random.default_rng(1).integers(0, 4, (8, 6))
    theirs, ours = build(layers.TimeDistributed), build(TimeDistributed)
    ours.set_weights(theirs.get_weights())
    for _ in range(2):
        assert_close(ours.train_on_batch(x, y), theirs.train_on_batch(x, y))
    assert_close(ours.get_weights(), theirs.get_weights())


# Bad input


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((BATCH,), "must be at least 2D"),
        ((BATCH + 1, STEPS), "has a shape .* of the input, of shape"),
        ((BATCH, STEPS + 1), "has a shape"),
        ((BATCH, STEPS + 1, 2), "has a shape"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    layer, x = TimeDistributed(layers.Dense(5)), normal(0, BATCH, STEPS, 3)
    with pytest.raises(ValueError, match=message):
        layer(x, mask=np.ones(mask, bool))
    for shape in [(BATCH, STEPS), (BATCH, STEPS, 1), (BATCH, STEPS, 2)]:
        assert layer(x, mask=np.ones(shape, bool)).shape == (BATCH, STEPS, 5)


def test_bad_arguments_are_refused(user_errors):
    with pytest.raises(ValueError, match="Layer"):
        TimeDistributed("dense")
    with pytest.raises(ValueError, match="method must be one of"):
        TimeDistributed(layers.Dense(2), method="scan")
    with pytest.raises(TypeError, match="chunk_size must be a positive int"):
        TimeDistributed(layers.Dense(2), chunk_size=1.5)
    with pytest.raises(ValueError, match=r"at least 3 dimensions.*\(None, 5\)"):
        TimeDistributed(layers.Dense(2))(keras.Input((5,)))
    built = TimeDistributed(layers.Dense(2))
    built.build((2, 3, 4))
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        built(normal(0, 2, 4))
    two = TimeDistributed(layers.Concatenate())
    with pytest.raises(ValueError, match="one size"):
        two([normal(0, 2, 3, 4), normal(0, 2, 5, 4)])
    with pytest.raises(TypeError, match=r"keras\.Model"):
        replace_time_distributed(layers.Dense(2))


def test_another_backend_is_refused_with_what_to_set(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"'torch'\. Set KERAS_BACKEND=jax"):
        TimeDistributed(layers.Dense(2))


# Files and models


def small_model(wrapper, **options):
    """Noise and statistics, at two depths."""
    keras.utils.set_random_seed(3)
    inner = keras.Sequential([layers.Dense(4), layers.BatchNormalization()])
    return keras.Sequential(
        [
            keras.Input((STEPS, 6)),
            wrapper(inner, name="inner", **options),
            wrapper(layers.Dropout(0.3, seed=2), name="noise", **options),
            keras.Sequential([wrapper(layers.Dense(2), name="head", **options)]),
        ]
    )


def test_config_weights_and_keras_files_round_trip(tmp_path):
    options = {"method": "vmap", "chunk_size": 3, "unroll": True, "remat": True}
    model = small_model(TimeDistributed, share_rng=True, **options)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    layer = again.get_layer("inner")
    assert type(layer) is TimeDistributed
    assert {name: getattr(layer, name) for name in options} == options
    assert layer.share_rng is True
    x = normal(0, BATCH, STEPS, 6)
    assert_close([again(x)], [model(x)])
    config = keras.layers.TimeDistributed(layers.Dense(2)).get_config()
    assert TimeDistributed.from_config(config).layer.units == 2


def test_weights_of_keras_own_layer_load(tmp_path):
    theirs, ours = small_model(layers.TimeDistributed), small_model(TimeDistributed)
    x = normal(0, BATCH, STEPS, 6)
    theirs.compile("sgd", "mse")
    theirs.fit(x, x[..., :2], verbose=0)
    theirs.save_weights(tmp_path / "model.weights.h5")
    ours.load_weights(tmp_path / "model.weights.h5")
    assert_close([ours(x)], [theirs(x)])


def test_a_compiled_model_goes_on_training_with_the_layers_replaced():
    x = normal(0, BATCH, STEPS, 6)
    data = x, x[..., :2]
    theirs, model = (small_model(layers.TimeDistributed) for _ in range(2))
    for each in (theirs, model):
        each.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        each.train_on_batch(*data)
    weights, optimizer = model.weights, model.optimizer
    replaced = replace_time_distributed(model, chunk_size=3)
    assert replaced is model
    wrapped = [layer for layer in model._flatten_layers() if hasattr(layer, "method")]
    assert [type(layer) for layer in wrapped] == [TimeDistributed] * 3
    assert all(layer.chunk_size == 3 for layer in wrapped)
    assert model.optimizer is optimizer
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    for _ in range(2):
        assert_close([model.train_on_batch(*data)], [theirs.train_on_batch(*data)])
    assert_close(model.weights, theirs.weights)
    assert_close([model.predict(x, verbose=0)], [theirs.predict(x, verbose=0)])


@pytest.mark.parametrize("options", [{"method": "scan"}, {"chunk_size": 0}])
def test_a_refused_option_leaves_the_model_as_it_is(user_errors, options):
    model = small_model(layers.TimeDistributed)
    with pytest.raises(ValueError, match=next(iter(options))):
        replace_time_distributed(model, **options)
    assert type(model.get_layer("inner")) is layers.TimeDistributed


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_inference_is_exported_with_symbolic_batch_and_time(options):
    layer = TimeDistributed(layers.Dense(2), **options)
    layer.build((None, None, 3))
    batch, steps = jax.export.symbolic_shape("b, t", constraints=["t >= 2"])
    x = jax.ShapeDtypeStruct((batch, steps, 3), "float32")
    run = jax.export.export(jax.jit(lambda x: layer(x)))(x)
    x = normal(0, 2, 7, 3)
    assert_close([run.call(x)], [layer(x)])


def test_subclasses_of_keras_own_layer_are_left_alone():
    class Own(layers.TimeDistributed):
        pass

    model = keras.Sequential([keras.Input((3, 4)), Own(layers.Dense(2))])
    assert type(replace_time_distributed(model).layers[0]) is Own


def test_a_program_does_not_grow_with_the_number_of_steps():
    layer = TimeDistributed(
        keras.Sequential([layers.Dense(4), layers.BatchNormalization()])
    )
    layer.build((2, 8, 3))

    def run(trainable, others, x):
        return layer.stateless_call(trainable, others, x, training=True)

    def equations(steps):
        values = [
            [v.value for v in vs]
            for vs in (layer.trainable_variables, layer.non_trainable_variables)
        ]
        program = jax.make_jaxpr(run)(*values, np.zeros((2, steps, 3), "float32"))
        return str(program).count("\n")

    assert equations(100) == equations(900)


def test_the_adapter_is_loaded_when_it_is_asked_for():
    assert tdjax.keras.TimeDistributed is TimeDistributed
    assert "keras" in dir(tdjax)
