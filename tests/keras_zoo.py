"""Keras models of the kinds that people wrap, each built with a wrapper to be given."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
from keras import Input, Sequential
from keras import layers as kl


class Entry(NamedTuple):
    """A model and its inputs.

    Attributes:
      build: makes the model, given the class of `TimeDistributed`.
      shapes: of the inputs, without the batch.
      tokens: 0 for floats; for integers below it, of which 0 is padding.
      noisy: whether training draws noise.
    """

    build: Callable
    shapes: tuple
    tokens: int = 0
    noisy: bool = False


def normal_init(seed=0):
    return keras.initializers.RandomNormal(stddev=0.3, seed=seed)


def dense(wrap):
    return Sequential([Input((4, 10)), wrap(kl.Dense(5))])


def dense_chain(wrap):
    return Sequential(
        [Input((None, 16)), wrap(kl.Dense(8)), wrap(kl.Dense(32, "relu"))]
    )


def golden_tagger(wrap):
    gru = kl.GRU(16, return_sequences=True, reset_after=False)
    return Sequential([Input((64, 15)), gru, wrap(kl.Dense(15))])


def golden_classifier(wrap):
    del wrap
    gru = kl.GRU(16, reset_after=False)
    return Sequential([Input((64, 15)), gru, kl.Dense(8, "softmax")])


def gru_reset_after(wrap):
    gru = kl.GRU(4, return_sequences=True, bias_initializer=normal_init())
    return Sequential([Input((5, 3)), gru, wrap(kl.Dense(2, "softmax"))])


def simple_rnn(wrap):
    rnn = kl.SimpleRNN(5, return_sequences=True)
    return Sequential([Input((6, 1)), rnn, wrap(kl.Dense(1))])


def bidirectional(wrap):
    lstm = kl.Bidirectional(kl.LSTM(3, return_sequences=True))
    return Sequential([Input((4, 3)), lstm, wrap(kl.Dense(2, "gelu"))])


def bidirectional_last_states(wrap):
    gru = kl.Bidirectional(kl.GRU(3), merge_mode="sum")
    return Sequential([Input((4, 3)), wrap(kl.Dense(4, "tanh")), gru, kl.Dense(2)])


def backwards(wrap):
    lstm = kl.LSTM(3, return_sequences=True, go_backwards=True)
    return Sequential([Input((4, 3)), lstm, wrap(kl.Dense(2))])


def video(wrap):
    return Sequential(
        [
            Input((3, 6, 6, 2)),
            wrap(kl.Conv2D(3, 3, padding="same")),
            wrap(kl.BatchNormalization(momentum=0.8)),
            wrap(kl.Activation("relu")),
            wrap(kl.MaxPooling2D(2)),
            wrap(kl.Flatten()),
            kl.LSTM(4),
            kl.Dense(3),
        ]
    )


def frames_as_a_model(wrap):
    frame = Sequential(
        [
            kl.Conv2D(3, 2, strides=2, activation="elu"),
            kl.BatchNormalization(momentum=0.9, epsilon=1e-4),
            kl.GlobalAveragePooling2D(),
        ]
    )
    return Sequential([Input((3, 5, 5, 1)), wrap(frame), kl.GRU(3), kl.Dense(2)])


def norm_over_steps(wrap):
    return Sequential(
        [Input((4, 3)), kl.Dense(5), kl.BatchNormalization(), wrap(kl.Dense(2))]
    )


def norm_of_each_step(wrap):
    step = Sequential([kl.Dense(5), kl.BatchNormalization(momentum=0.7), kl.Dense(2)])
    return Sequential([Input((4, 3)), wrap(step)])


def autoencoder(wrap):
    return Sequential(
        [
            Input((None, 2)),
            kl.Conv1D(4, 3, padding="same", activation="relu"),
            kl.LSTM(3, return_sequences=True),
            kl.Conv1DTranspose(3, 3, padding="same"),
            wrap(kl.Dense(1)),
        ]
    )


def sequence_to_sequence(wrap):
    return Sequential(
        [
            Input((5, 2)),
            kl.LSTM(4, bias_initializer=normal_init()),
            kl.RepeatVector(3),
            kl.LSTM(4, return_sequences=True),
            wrap(kl.Dense(2)),
        ]
    )


def tagger_of_tokens(wrap):
    return Sequential(
        [
            Input((5,), dtype="int32"),
            kl.Embedding(7, 4, mask_zero=True),
            kl.Bidirectional(kl.GRU(3, return_sequences=True)),
            wrap(kl.Dense(3, "softmax")),
        ]
    )


def masked_values(wrap):
    lstm = kl.LSTM(3, return_sequences=True)
    return Sequential([Input((5, 2)), kl.Masking(), lstm, wrap(kl.Dense(2))])


def words_of_sentences(wrap):
    words = Input((4,), dtype="int32")
    encoded = kl.GRU(4)(kl.Embedding(9, 3)(words))
    encoder = keras.Model(words, encoded)
    document = Input((3, 4), dtype="int32")
    states = kl.Bidirectional(kl.GRU(3))(wrap(encoder)(document))
    return keras.Model(document, kl.Dense(2)(states))


def masked_words_of_sentences(wrap):
    document = Input((3, 4), dtype="int32")
    embedded = kl.Embedding(9, 3, mask_zero=True)(document)
    sentences = wrap(kl.LSTM(4, return_sequences=True))(embedded)
    return keras.Model(document, wrap(wrap(kl.Dense(2)))(sentences))


def nested(wrap):
    return Sequential([Input((3, 4, 5)), wrap(wrap(kl.Dense(2, "sigmoid")))])


def residual(wrap):
    x = Input((4, 3))
    hidden = wrap(kl.Dense(3, "swish"))(x)
    total = kl.Add()([hidden, x]) + 0.5 * hidden
    return keras.Model(x, wrap(kl.Dense(2))(kl.Concatenate()([total, x])))


def shared(wrap):
    x = Input((4, 3))
    step = wrap(kl.Dense(3, "tanh"))
    return keras.Model(x, step(step(x)))


def several_inputs_and_outputs(wrap):
    a, b = Input((4, 3), name="a"), Input((4, 2), name="b")
    hidden = kl.Concatenate()([wrap(kl.Dense(3))(a), wrap(kl.Dense(2))(b)])
    return keras.Model([a, b], [wrap(kl.Dense(2))(hidden), kl.GRU(2)(hidden)])


def layer_norms(wrap):
    x = Input((3, 4, 5))
    y = wrap(kl.LayerNormalization())(x)
    y = kl.LayerNormalization(axis=[-2, -1], center=False)(y)
    return keras.Model(x, wrap(kl.Dense(2))(y))


def causal_convolutions(wrap):
    first = kl.Conv1D(4, 2, padding="causal", dilation_rate=2, activation="relu")
    second = kl.Conv1D(4, 3, strides=2, groups=2)
    return Sequential([Input((8, 2)), first, second, wrap(kl.Dense(2))])


def volumes(wrap):
    conv = kl.Conv3D(3, 2, padding="same", activation="softplus")
    pool = kl.AveragePooling3D(2)
    parts = [conv, pool, wrap(kl.GlobalMaxPooling2D()), wrap(kl.Dense(2))]
    return Sequential([Input((4, 4, 4, 2)), *parts])


def reshaped(wrap):
    return Sequential(
        [
            Input((4, 3)),
            kl.Flatten(),
            kl.Dense(6),
            kl.Reshape((3, 2)),
            wrap(kl.Dense(2)),
            wrap(kl.Reshape((2, 1))),
        ]
    )


def noise(wrap):
    return Sequential(
        [
            Input((4, 3)),
            wrap(Sequential([kl.Dense(4), kl.Dropout(0.4, seed=1)])),
            kl.LSTM(3, dropout=0.3, return_sequences=True, seed=2),
            wrap(kl.Dropout(0.2, seed=3)),
            kl.Dropout(0.2, seed=4),
            wrap(kl.Dense(2)),
        ]
    )


ZOO = {
    "dense": Entry(dense, ((4, 10),)),
    "dense chain": Entry(dense_chain, ((3, 16),)),
    "golden tagger": Entry(golden_tagger, ((64, 15),)),
    "golden classifier": Entry(golden_classifier, ((64, 15),)),
    "GRU, reset_after": Entry(gru_reset_after, ((5, 3),)),
    "SimpleRNN": Entry(simple_rnn, ((6, 1),)),
    "bidirectional": Entry(bidirectional, ((4, 3),)),
    "bidirectional, last states": Entry(bidirectional_last_states, ((4, 3),)),
    "backwards": Entry(backwards, ((4, 3),)),
    "video": Entry(video, ((3, 6, 6, 2),)),
    "frames as a model": Entry(frames_as_a_model, ((3, 5, 5, 1),)),
    "norm over steps": Entry(norm_over_steps, ((4, 3),)),
    "norm of each step": Entry(norm_of_each_step, ((4, 3),)),
    "autoencoder": Entry(autoencoder, ((6, 2),)),
    "sequence to sequence": Entry(sequence_to_sequence, ((5, 2),)),
    "tagger of tokens": Entry(tagger_of_tokens, ((5,),), tokens=7),
    "masked values": Entry(masked_values, ((5, 2),)),
    "words of sentences": Entry(words_of_sentences, ((3, 4),), tokens=9),
    "masked words": Entry(masked_words_of_sentences, ((3, 4),), tokens=9),
    "nested": Entry(nested, ((3, 4, 5),)),
    "residual": Entry(residual, ((4, 3),)),
    "shared": Entry(shared, ((4, 3),)),
    "several inputs and outputs": Entry(several_inputs_and_outputs, ((4, 3), (4, 2))),
    "layer norms": Entry(layer_norms, ((3, 4, 5),)),
    "causal convolutions": Entry(causal_convolutions, ((8, 2),)),
    "volumes": Entry(volumes, ((4, 4, 4, 2),)),
    "reshaped": Entry(reshaped, ((4, 3),)),
    "noise": Entry(noise, ((4, 3),), noisy=True),
}


def inputs(entry, batch=3):
    """Numbers, or tokens with padding; a list if there are several."""
    draw = np.random.default_rng(0)
    if entry.tokens:
        made = [draw.integers(0, entry.tokens, (batch, *s)) for s in entry.shapes]
    else:
        made = [draw.normal(size=(batch, *s)).astype("float32") for s in entry.shapes]
        if entry.build is masked_values:
            made[0][0, 3:] = made[0][1, 1] = 0
    return made if len(made) > 1 else made[0]
