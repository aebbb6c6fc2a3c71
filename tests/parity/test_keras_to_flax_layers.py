"""Every rule against Keras' own layer: outputs, gradients, state, masks."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers as k

from helpers import normal
from parity.keras_parity import assert_parity, sequential
from tdjax.keras import to_flax

SIZES = (7, 6, 5)
# Ragged, without a valid step, full.
IDS = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0], [1, 0, 2, 4]], np.int32)
OTHER_IDS = IDS[::-1].copy()
DOCUMENTS = np.array(
    [[[1, 2, 0], [0, 0, 0], [3, 0, 0]], [[1, 1, 1], [2, 3, 0], [0, 0, 0]]], np.int32
)
embed = functools.partial(k.Embedding, 5, 3, mask_zero=True)


def per_rank(name, *options):
    """A family of layers with every number of axes, and their input shapes."""
    return {
        f"{name}{rank}D {kwargs}": (
            lambda kind=f"{name}{rank}D", kwargs=kwargs: getattr(k, kind)(**kwargs),
            (*SIZES[:rank], 4),
        )
        for rank in (1, 2, 3)
        for kwargs in options
    }


CONV = {"filters": 4, "kernel_size": 2}
LAYERS = {
    "Dense": (lambda: k.Dense(4, "gelu"), (3,)),
    "Dense of steps, no bias": (lambda: k.Dense(4, use_bias=False), (4, 3)),
    "Conv1DTranspose": (
        lambda: k.Conv1DTranspose(3, 2, strides=2, activation="tanh"),
        (5, 4),
    ),
    **per_rank(
        "Conv",
        CONV,
        {**CONV, "padding": "same", "strides": 2, "activation": "relu"},
        {**CONV, "dilation_rate": 2, "groups": 2},
    ),
    "Conv1D causal": (
        lambda: k.Conv1D(3, 3, padding="causal", dilation_rate=2),
        (7, 4),
    ),
    **per_rank("Conv", {**CONV, "use_bias": False}),
    **per_rank("ZeroPadding", {}),
    **per_rank("Cropping", {}),
    **per_rank("UpSampling", {}),
    "ZeroPadding1D (0, 2)": (lambda: k.ZeroPadding1D((0, 2)), (4, 3)),
    "Cropping2D": (lambda: k.Cropping2D(((1, 0), (0, 2))), (4, 5, 3)),
    "DepthwiseConv1D": (
        lambda: k.DepthwiseConv1D(3, depth_multiplier=2, padding="same", strides=2),
        (7, 4),
    ),
    "DepthwiseConv2D": (
        lambda: k.DepthwiseConv2D((3, 2), activation="relu"),
        (5, 4, 2),
    ),
    "BatchNormalization": (k.BatchNormalization, (4, 3)),
    "BatchNormalization, axis 1": (
        lambda: k.BatchNormalization(axis=1, scale=False),
        (4, 3),
    ),
    "LayerNormalization": (k.LayerNormalization, (4, 3)),
    "LayerNormalization, two axes": (
        lambda: k.LayerNormalization(axis=[1, 3], center=False),
        (4, 3, 2),
    ),
    "RMSNormalization": (k.RMSNormalization, (4, 3)),
    "GroupNormalization": (lambda: k.GroupNormalization(2), (4, 3, 4)),
    "PReLU": (lambda: k.PReLU(shared_axes=[1]), (4, 3)),
    "ReLU": (lambda: k.ReLU(1.0, 0.1, 0.2), (4, 3)),
    "LeakyReLU": (k.LeakyReLU, (4, 3)),
    "ELU": (lambda: k.ELU(0.5), (4, 3)),
    "Softmax": (lambda: k.Softmax(axis=[1, 2]), (4, 3)),
    "Activation": (lambda: k.Activation("hard_sigmoid"), (4, 3)),
    "Activation of one's own": (lambda: k.Activation(jnp.sinh), (4, 3)),
    "Identity": (k.Identity, (4, 3)),
    "Rescaling": (lambda: k.Rescaling([1.0, 2.0, 3.0], 0.5), (4, 3)),
    "Flatten": (k.Flatten, (4, 3, 2)),
    "Reshape": (lambda: k.Reshape((3, -1)), (4, 3)),
    "Permute": (lambda: k.Permute((2, 1)), (4, 3)),
    "RepeatVector": (lambda: k.RepeatVector(3), (4,)),
    "Dropout at inference": (lambda: k.Dropout(0.5), (4, 3)),
    "SpatialDropout2D at inference": (lambda: k.SpatialDropout2D(0.5), (4, 3, 2)),
    "GaussianNoise at inference": (lambda: k.GaussianNoise(0.5), (4, 3)),
    **per_rank("MaxPooling", {}, {"pool_size": 3, "strides": 2, "padding": "same"}),
    **per_rank(
        "AveragePooling",
        {"pool_size": 2},
        {"pool_size": 3, "strides": 2, "padding": "same"},
    ),
    **per_rank("GlobalMaxPooling", {"keepdims": True}),
    **per_rank("GlobalAveragePooling", {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_agrees_with_keras(name):
    make, shape = LAYERS[name]
    assert_parity(sequential(make(), shape=shape), normal(1, 2, *shape))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 2, "strides": 2},
        {"kernel_size": 2, "strides": 4},
        {"kernel_size": 3, "strides": 3, "output_padding": 1},
        {"kernel_size": 3, "dilation_rate": 2},
    ],
)
def test_transposed_convolution_has_the_size_and_values_of_keras(
    rank, padding, options
):
    layer = getattr(k, f"Conv{rank}DTranspose")(2, padding=padding, **options)
    shape = (*SIZES[:rank][::-1], 3)
    model = sequential(layer, shape=shape)
    module, variables = to_flax(model)
    x = normal(1, 2, *shape)
    np.testing.assert_allclose(module.apply(variables, x), model(x), 1e-5, 1e-5)


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize("axis", [-1, [1, 3]])
def test_layer_normalization_by_the_variance_alone(axis):
    layer = k.LayerNormalization(axis=axis, rms_scaling=True)
    assert_parity(sequential(layer, shape=(4, 3, 2)), normal(1, 2, 4, 3, 2))


MERGES = {
    **{
        name: (getattr(k, name), (4, 3), (4, 3))
        for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")
    },
    "Add of two ranks": (k.Add, (4, 3), (3,)),
    "Concatenate": (lambda: k.Concatenate(axis=1), (4, 3), (2, 3)),
    "Dot": (lambda: k.Dot(2), (4, 3), (5, 3)),
    "Dot, cosine": (lambda: k.Dot(1, normalize=True), (3,), (3,)),
    "Dot of two ranks": (lambda: k.Dot((1, 2)), (4,), (5, 4, 2)),
}


@pytest.mark.parametrize("name", MERGES)
def test_merging_layer_agrees_with_keras(name):
    make, *shapes = MERGES[name]
    inputs = [keras.Input(shape) for shape in shapes]
    x = [normal(place, 2, *shape) for place, shape in enumerate(shapes)]
    assert_parity(keras.Model(inputs, make()(inputs)), x)


def frozen(layer):
    layer.trainable = False
    return layer


def small_conv():
    layers = k.Conv1D(3, 2), k.BatchNormalization(momentum=0.8), k.Flatten()
    return sequential(*layers, k.Dense(2), shape=(4, 2))


TRAINING = {
    "BatchNormalization": (lambda: k.BatchNormalization(momentum=0.8), (4, 3)),
    "BatchNormalization, axis 1": (
        lambda: k.BatchNormalization(axis=1, center=False),
        (4, 3),
    ),
    "frozen BatchNormalization": (lambda: frozen(k.BatchNormalization()), (4, 3)),
    "step after step": (lambda: k.TimeDistributed(k.BatchNormalization()), (4, 3)),
    "step after step, nested": (
        lambda: k.TimeDistributed(k.TimeDistributed(k.BatchNormalization())),
        (3, 2, 2),
    ),
    "a model of every step": (lambda: k.TimeDistributed(small_conv()), (3, 4, 2)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_batch_statistics_move_as_in_keras(name):
    make, shape = TRAINING[name]
    assert_parity(sequential(make(), shape=shape), normal(1, 5, *shape), train=True)


TIME_DISTRIBUTED = {
    "Dense": (lambda: k.TimeDistributed(k.Dense(2)), (4, 3)),
    "nested": (lambda: k.TimeDistributed(k.TimeDistributed(k.Dense(2))), (3, 2, 3)),
    "Conv2D": (lambda: k.TimeDistributed(k.Conv2D(2, 2)), (3, 4, 4, 2)),
    "LayerNormalization": (lambda: k.TimeDistributed(k.LayerNormalization()), (4, 3)),
    "a model": (lambda: k.TimeDistributed(small_conv()), (3, 4, 2)),
    "an RNN": (lambda: k.TimeDistributed(k.GRU(2)), (3, 4, 2)),
}


@pytest.mark.parametrize("name", TIME_DISTRIBUTED)
def test_time_distributed_agrees_with_keras(name):
    make, shape = TIME_DISTRIBUTED[name]
    assert_parity(sequential(make(), shape=shape), normal(1, 2, *shape))


def test_variables_of_time_distributed_are_those_of_its_layer():
    layer = k.TimeDistributed(k.TimeDistributed(k.Dense(2)), name="head")
    _, variables = to_flax(sequential(layer, shape=(4, 3, 5)))
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {"params": {"head": {"kernel": (5, 2), "bias": (2,)}}}


MASKED = {
    "an RNN": lambda: (embed(), k.GRU(2)),
    "sequences, then another": lambda: (
        embed(),
        k.LSTM(2, return_sequences=True),
        k.TimeDistributed(k.Dense(2)),
        k.Dropout(0.0),
        k.GRU(2),
    ),
    "both ways": lambda: (embed(), k.Bidirectional(k.GRU(2)), k.Dense(2)),
    "Masking": lambda: (
        k.Embedding(5, 3),
        k.Activation("relu"),
        k.Masking(),
        k.GRU(2, return_sequences=True),
    ),
    "BatchNormalization": lambda: (embed(), k.BatchNormalization()),
    "BatchNormalization of steps": lambda: (
        embed(),
        k.TimeDistributed(k.BatchNormalization()),
    ),
    "a model's own mask": lambda: (
        sequential(embed(), k.Dense(2), shape=(4,), dtype="int32"),
        k.GRU(2),
    ),
    "ended by Reshape": lambda: (
        embed(),
        k.Reshape((6, 2)),
        k.Reshape((4, 3)),
        k.GRU(2),
    ),
    "kept where nothing changes": lambda: (embed(), k.Reshape((4, 3)), k.GRU(2)),
}


@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
@pytest.mark.parametrize("name", MASKED)
def test_masks_go_from_layer_to_layer_as_in_keras(name):
    model = sequential(*MASKED[name](), shape=(4,), dtype="int32")
    assert_parity(model, IDS, train="BatchNormalization" in name)


def test_pooling_takes_the_mean_of_what_is_not_masked():
    model = sequential(embed(), k.GlobalAveragePooling1D(), shape=(4,), dtype="int32")
    assert_parity(model, IDS[[0, 1, 3]])


def test_softmax_leaves_masked_values_out():
    inputs, ids = keras.Input((4,)), keras.Input((4,), dtype="int32")
    outputs = k.Softmax()(inputs, mask=keras.ops.not_equal(ids, 0))
    assert_parity(keras.Model([inputs, ids], outputs), [normal(1, 4, 4), IDS])


def test_a_mask_over_words_is_one_over_lines_for_the_layer_after():
    layers = k.TimeDistributed(k.LSTM(2)), k.GRU(2, return_sequences=True)
    model = sequential(embed(), *layers, shape=(3, 3), dtype="int32")
    assert_parity(model, DOCUMENTS)


def test_a_mask_over_words_stays_while_there_are_words():
    layers = (
        k.TimeDistributed(k.GRU(2, return_sequences=True)),
        k.TimeDistributed(k.TimeDistributed(k.Dense(2))),
        k.TimeDistributed(k.GRU(2)),
    )
    model = sequential(embed(), *layers, shape=(3, 3), dtype="int32")
    assert_parity(model, DOCUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("masked", ["both", "first", "second"])
@pytest.mark.parametrize(
    "merge", ["Add", "Multiply", "Average", "Maximum", "Minimum", "Concatenate"]
)
def test_merging_layers_treat_masks_as_keras_does(merge, masked):
    ids = [keras.Input((4,), dtype="int32") for _ in range(2)]
    embedded = [
        k.Embedding(5, 3, mask_zero=masked in ("both", which))(x)
        for which, x in zip(("first", "second"), ids)
    ]
    outputs = k.GRU(2)(getattr(k, merge)()(embedded))
    assert_parity(keras.Model(ids, outputs), [IDS, OTHER_IDS])


def test_masks_of_sequences_one_after_the_other():
    ids = [keras.Input((4,), dtype="int32") for _ in range(2)]
    both = k.Concatenate(axis=1)([embed()(ids[0]), k.Embedding(5, 3)(ids[1])])
    assert_parity(keras.Model(ids, k.GRU(2)(both)), [IDS, OTHER_IDS])


def test_an_initial_state_displaces_the_mask_as_in_keras():
    ids = [keras.Input((4,), dtype="int32") for _ in range(2)]
    _, *states = k.LSTM(2, return_state=True)(embed()(ids[0]))
    outputs = k.LSTM(2, return_sequences=True)(embed()(ids[1]), initial_state=states)
    outputs = k.TimeDistributed(k.Dense(2))(outputs)
    assert_parity(keras.Model(ids, outputs), [IDS, OTHER_IDS])


def test_a_mask_given_to_the_call():
    model = sequential(k.GRU(2), k.Dense(2), shape=(4, 3))
    assert_parity(model, normal(1, 4, 4, 3), mask=jnp.asarray(IDS != 0))


NOISES = {
    "Dropout": (lambda: k.Dropout(0.5), ()),
    "noise_shape": (lambda: k.Dropout(0.5, noise_shape=(None, 1, None)), (1,)),
    "SpatialDropout1D": (lambda: k.SpatialDropout1D(0.5), (1,)),
}


@pytest.mark.parametrize("name", NOISES)
def test_dropout_in_training(name, key):
    make, shared = NOISES[name]
    module, variables = to_flax(sequential(make(), shape=(20, 30)))
    x = 1 + jnp.abs(normal(1, 10, 20, 30))
    apply = lambda key: module.apply(variables, x, train=True, rngs={"dropout": key})
    y = apply(key)
    kept = y != 0
    np.testing.assert_allclose(y, jnp.where(kept, 2 * x, 0), 1e-6)
    assert 0.4 < jnp.mean(kept) < 0.6
    for axis in range(3):
        same = jnp.all(kept == jnp.roll(kept, 1, axis))
        assert same == (axis in shared)
    assert not jnp.array_equal(y, apply(NOISE_OF_ANOTHER_CALL))


NOISE_OF_ANOTHER_CALL = jax.random.key(8)


def test_gaussian_noise_in_training(key):
    module, variables = to_flax(sequential(k.GaussianNoise(0.5), shape=(200,)))
    x = jnp.zeros((50, 200))
    y = module.apply(variables, x, train=True, rngs={"dropout": key})
    assert abs(jnp.std(y) - 0.5) < 0.01
    assert abs(jnp.mean(y)) < 0.02


def test_steps_draw_noise_of_their_own(key):
    layer = k.TimeDistributed(k.Dropout(0.5))
    module, variables = to_flax(sequential(layer, shape=(4, 50)))
    x = jnp.ones((2, 4, 50))
    y = module.apply(variables, x, train=True, rngs={"dropout": key})
    assert not jnp.array_equal(y[:, 0], y[:, 1])
