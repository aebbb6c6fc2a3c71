"""Models that Keras' `TimeDistributed` was reported slow in, and what they are fed."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

RATE = 0.01  # of gradient descent


class Reported(NamedTuple):
    """A Keras model over sequences of unknown length, and the lengths of its batches.

    Attributes:
      title: what the tables call it.
      build: `build(keras, wrap, step)`, its layers; `wrap` is a `TimeDistributed`.
      lengths: the steps of one batch after the other; each new one compiles again.
      batch: examples in a batch.
      step: the shape of one step of one example.
      passes: how often one timed `fit` goes through the batches.
    """

    title: str
    build: Callable[[Any, Any, tuple], list]
    lengths: tuple[int, ...]
    batch: int
    step: tuple[int, ...]
    passes: int = 1

    @property
    def name(self) -> str:
        each = ", then ".join(str([self.batch, t, *self.step]) for t in self.lengths)
        return f"{self.title}, {each}"

    def model(self, wrap) -> Any:
        """A new compiled model; all have the same weights, whatever `wrap` is."""
        import keras

        keras.utils.set_random_seed(0)
        layers = self.build(keras.layers, wrap, self.step)
        model = keras.Sequential([keras.Input((None, *self.step)), *layers])
        model.compile(optimizer=keras.optimizers.SGD(RATE), loss="mse")
        return model

    def batches(self, model) -> list[tuple[jax.Array, jax.Array]]:
        """`(x, y)` of each length, on the device."""
        return jax.block_until_ready([*self._batches(model)])

    def _batches(self, model) -> Iterator[tuple[jax.Array, jax.Array]]:
        for timesteps in self.lengths:
            keys = jax.random.split(jax.random.key(timesteps))
            shape = (self.batch, timesteps, *self.step)
            x = jax.random.normal(keys[0], shape)
            yield x, jax.random.normal(keys[1], model.compute_output_shape(shape))


def cases(quick: bool) -> list[Reported]:
    if quick:
        return [
            Reported("Dense(64)", _dense, (6,), 3, (4,)),
            Reported("autoencoder", _autoencoder, (4, 6), 2, (3,)),
            Reported("video", _video, (3,), 2, (8, 8, 3)),
        ]
    lengths = (16, 128, 512, 1024, 4096)
    return [
        *(Reported("Dense(64)", _dense, (each,), 32, (16,), 8) for each in lengths),
        Reported("autoencoder", _autoencoder, (128, 192, 256), 16, (8,), 2),
        Reported("video", _video, (16,), 4, (32, 32, 3)),
        Reported("video", _video, (128,), 2, (16, 16, 3)),
    ]


def _dense(layers, wrap, step) -> list:
    return [wrap(layers.Dense(64))]


def _autoencoder(layers, wrap, step) -> list:
    """Half as many steps inside, and a head for each step."""
    halves = {"strides": 2, "padding": "same", "activation": "relu"}
    return [
        layers.Conv1D(32, 5, **halves),
        layers.LSTM(32, return_sequences=True),
        layers.Conv1DTranspose(32, 5, **halves),
        wrap(layers.Dense(1)),
    ]


def _video(layers, wrap, step) -> list:
    return [
        wrap(layers.Conv2D(16, 3, activation="relu")),
        wrap(layers.MaxPooling2D()),
        wrap(layers.Flatten()),
        layers.LSTM(32),
        layers.Dense(5),
    ]
