"""Keras' layers as Flax modules, where Flax has none that can be used as it is.

Nothing here knows Keras. Parameters have Flax's names and Keras' shapes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from tdjax._keras_activations import Activation
from tdjax._keras_initializers import glorot_uniform


class Dense(nn.Dense):
    """`nn.Dense` with an activation."""

    kernel_init: Any = glorot_uniform
    activation: Callable = Activation("linear")

    def __call__(self, inputs):
        return self.activation(super().__call__(inputs))
