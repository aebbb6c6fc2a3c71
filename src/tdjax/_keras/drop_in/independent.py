"""Which Keras layers treat examples independently, so that steps can be examples."""

from typing import Literal

import keras
from keras import layers
from keras.src.models.functional import Functional

Method = Literal["vmap", "fold"]
_PLAIN = ("InputLayer", "Identity", "Dense", "Embedding", "Masking")
# `Softmax` reads a mask of examples as one of features.
_ACTIVATIONS = ("Activation", "ReLU", "LeakyReLU", "ELU", "PReLU")
_NORMS = ("LayerNormalization", "GroupNormalization", "RMSNormalization")
_SHAPES = ("Flatten", "Reshape", "Permute", "RepeatVector", "Concatenate")
_SUMS = ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")
_RECURRENT = ("SimpleRNN", "LSTM", "GRU", "SimpleRNNCell", "LSTMCell", "GRUCell")
_CONVS = ("Conv{}D", "Conv{}DTranspose", "DepthwiseConv{}D", "SeparableConv{}D")
_POOLS = ("MaxPooling{}D", "AveragePooling{}D")
_GLOBAL_POOLS = ("GlobalMaxPooling{}D", "GlobalAveragePooling{}D")
_SPATIAL = ("UpSampling{}D", "ZeroPadding{}D", "Cropping{}D")
_OF_ANY_RANK = _CONVS + _POOLS + _GLOBAL_POOLS + _SPATIAL
_NAMES = _PLAIN + _ACTIVATIONS + _NORMS + _SHAPES + _SUMS + _RECURRENT
_NAMES += ("Bidirectional",)
_NAMES += tuple(name.format(rank) for name in _OF_ANY_RANK for rank in (1, 2, 3))
# The oldest supported Keras lacks some, and some are not there for every rank.
_INDEPENDENT = {getattr(layers, name, None) for name in _NAMES}
_KERAS = layers.TimeDistributed.__module__


def equal_method(layer: keras.Layer, *, share_rng: bool = False) -> Method:
    """The fastest method that certainly equals a loop over steps.

    It is "fold" if an example's result certainly depends on that example only: not on
    other examples, noise or what a call has written; and if the call adds no loss. Only
    Keras' own layers are certain to be so.
    """
    independent = not share_rng and all(map(_is_independent, layer._flatten_layers()))
    return "fold" if independent else "vmap"


def _is_independent(layer) -> bool:
    if type(layer) is Functional:
        return all(map(_is_layer_of_tensors, layer.operations))
    known = type(layer) is keras.Sequential or type(layer) in _INDEPENDENT
    if isinstance(layer, layers.TimeDistributed):
        known = type(layer).__module__ in (_KERAS, "tdjax.keras")
    return known and _is_plain(layer) and _keeps_the_batch(layer)


def _is_layer_of_tensors(operation) -> bool:
    """A constant array among the arguments may have an axis for the batch."""
    calls = [node.arguments for node in operation._inbound_nodes]
    leaves = keras.tree.flatten([(call.args, call.kwargs) for call in calls])
    arrays = [x for x in leaves if hasattr(x, "shape")]
    is_layer = isinstance(operation, keras.Layer)
    return is_layer and all(isinstance(x, keras.KerasTensor) for x in arrays)


def _is_plain(layer) -> bool:
    options = ("dropout", "recurrent_dropout", "stateful")
    return (
        not any(getattr(layer, name, None) for name in options)
        and layer.activity_regularizer is None
        and layer.quantization_mode is None
    )


def _keeps_the_batch(layer) -> bool:
    axes = getattr(layer, "axis", -1)
    axes = axes if isinstance(axes, list | tuple) else [axes]
    # Depending on the input's rank, other negative axes may be the batch; so is the
    # last one if an example is a single number.
    if not all(isinstance(axis, int) and (axis == -1 or axis > 0) for axis in axes):
        return False
    if getattr(layer, "target_shape", None) == ():
        return False
    names = ("activation", "recurrent_activation")
    functions = [getattr(layer, name, None) for name in names]
    known = keras.activations.linear.__module__
    return all(f is None or getattr(f, "__module__", "") == known for f in functions)
