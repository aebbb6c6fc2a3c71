"""Layers, and the drop-in beside Keras' own wrapper, for the tests of both."""

import inspect

import keras
import numpy as np
from keras import layers, ops

from tdjax.keras import TimeDistributed

BATCH, STEPS = 3, 4

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
