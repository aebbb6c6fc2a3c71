"""The drop-in beside Keras' own layer: the same numbers, state, masks and files."""

import inspect

import jax
import keras
import numpy as np
import pytest
from keras import layers, ops

import tdjax
from tdjax.keras import TimeDistributed, replace_time_distributed

BATCH, STEPS = 3, 4
BLOCKS = [
    {"method": "vmap", "chunk_size": 3},
    {"method": "vmap", "chunk_size": 1, "remat": True},
    {"method": "vmap", "chunk_size": 2, "unroll": True},
    {"method": "fold", "chunk_size": 3, "remat": True},
]

# name -> (a layer, the shape of one example)
ALONE = {
    "dense": (lambda: layers.Dense(5, "relu", kernel_regularizer="l2"), (6,)),
    "conv2d": (lambda: layers.Conv2D(2, 3, padding="same"), (5, 5, 2)),
    "conv1d_transpose": (lambda: layers.Conv1DTranspose(2, 3), (5, 2)),
    "lstm": (lambda: layers.LSTM(3), (5, 2)),
    "layer_norm": (lambda: layers.LayerNormalization(), (6,)),
    "nested": (lambda: TimeDistributed(layers.Dense(2)), (3, 4)),
    "sequential": (
        lambda: keras.Sequential(
            [layers.Conv1D(2, 2), layers.MaxPooling1D(2), layers.Flatten()]
        ),
        (5, 2),
    ),
}
OTHERS = {
    "dropout": (lambda: layers.Dropout(0.5, seed=3), (6,)),
    "spatial_dropout": (lambda: layers.SpatialDropout1D(0.5, seed=3), (5, 6)),
    "lstm_dropout": (
        lambda: layers.LSTM(3, dropout=0.4, recurrent_dropout=0.3, seed=1),
        (5, 2),
    ),
    "batch_norm": (lambda: layers.BatchNormalization(momentum=0.8), (6,)),
    "batch_renorm": (
        lambda: layers.BatchNormalization(momentum=0.8, renorm=True),
        (6,),
    ),
    "spectral_norm": (lambda: layers.SpectralNormalization(layers.Dense(4)), (6,)),
    "norm_and_noise": (
        lambda: keras.Sequential(
            [
                layers.Dense(4, activity_regularizer="l2"),
                layers.BatchNormalization(momentum=0.7),
                layers.Dropout(0.3, seed=5),
            ]
        ),
        (6,),
    ),
}

if "renorm" not in inspect.signature(layers.BatchNormalization).parameters:
    del OTHERS["batch_renorm"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def pair(make, shape, **options):
    """Keras' layer and the drop-in, with the same variables."""
    theirs, ours = layers.TimeDistributed(make()), TimeDistributed(make(), **options)
    for layer in (theirs, ours):
        layer.build((BATCH, STEPS, *shape))
    draw = np.random.default_rng(1)
    for mine, yours in zip(ours.variables, theirs.variables, strict=True):
        if mine.dtype == "float32":
            yours.assign(draw.uniform(0.2, 1.0, yours.shape))
        mine.assign(yours)
    return theirs, ours


def assert_close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        a, b = (np.asarray(ops.convert_to_numpy(x), np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def assert_alike(theirs, ours, x, **call):
    """The same outputs, variables and losses, twice in a row."""
    for _ in range(2):
        assert_close([ours(x, **call)], [theirs(x, **call)])
        assert_close(ours.variables, theirs.variables)
        assert_close([sum(ours.losses, 0.0)], [sum(theirs.losses, 0.0)])


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


def custom(x):
    return x - ops.mean(x, axis=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Dense(3, activation=custom),
        lambda: keras.Sequential([layers.Dense(3), Centred()]),
        lambda: layers.Softmax(axis=-2),
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
    with pytest.raises(ValueError, match="losses that it adds would be other ones"):
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

    with pytest.raises(ValueError, match="must write to variables of its own only"):
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
