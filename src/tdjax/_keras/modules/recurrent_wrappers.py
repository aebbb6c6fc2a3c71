"""Keras' wrappers of recurrent layers as Flax Linen modules: both ways, and stacks."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tdjax._checks import describe
from tdjax._keras.modules.graph import parameters

_MERGE = {
    "concat": lambda y, back: jnp.concatenate([y, back], axis=-1),
    "sum": lambda y, back: y + back,
    "ave": lambda y, back: (y + back) / 2,
    "mul": lambda y, back: y * back,
    None: lambda y, back: (y, back),
}


class Bidirectional(nn.Module):
    """Two recurrent layers, one from each end, and their outputs merged.

    The fields are those of Keras' layer. The outputs of `backward_layer`, which goes
    backwards, are put in order. With `return_state` the states of the forward layer
    come first: `(output, *states)`, or `(forward, backward, *states)` without merging.
    """

    forward_layer: nn.Module
    backward_layer: nn.Module
    merge_mode: Literal["concat", "sum", "ave", "mul"] | None = "concat"
    return_sequences: bool = False
    return_state: bool = False
    dtype: Any = None

    def __call__(self, sequences, initial_state=None, mask=None, train: bool = False):
        """As the two layers; `initial_state` has the forward layer's states first."""
        [sequences] = promote_dtype(sequences, dtype=self.dtype)
        layers = self.forward_layer, self.backward_layer
        options = {"mask": mask, "train": train}
        results = [
            _call(layer, sequences, initial_state=initial, **options)
            for layer, initial in zip(layers, _halves(initial_state))
        ]
        if not self.return_state:
            return self._merge(*results)
        (y, *states), (back, *back_states) = results
        y = self._merge(y, back)
        return (*(y if self.merge_mode is None else (y,)), *states, *back_states)

    def _merge(self, y, back):
        y, back = promote_dtype(y, back, dtype=self.dtype)
        if self.return_sequences:
            back = jnp.flip(back, axis=1)
        return _MERGE[self.merge_mode](y, back)

    @nn.nowrap
    def compute_mask(self, inputs, mask):
        """The mask of the output, or of the outputs before the states."""
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        mask = mask if self.return_sequences else None
        return (mask, mask) if self.merge_mode is None else mask


class StackedRNN(nn.Module):
    """Recurrent layers on top of each other: what Keras' `StackedRNNCells` compute.

    All `cells` return their states; all but the last return sequences, and only the
    first may go backwards. With `return_state`, `(output, *states)`: a list per layer.
    """

    cells: tuple[nn.Module, ...]
    return_state: bool = False

    def __call__(self, sequences, initial_state=None, mask=None, train: bool = False):
        """Runs layer after layer; `initial_state` is a list of states for each."""
        initial_state = self._initial_states(initial_state)
        x, states = sequences, []
        for cell, initial in zip(self.cells, initial_state):
            x, *after = cell(x, initial_state=initial, mask=mask, train=train)
            states.append(after)
            if mask is not None and cell.go_backwards:
                mask = jnp.flip(mask, axis=1)
        return (x, *states) if self.return_state else x

    def _initial_states(self, given):
        if given is None:
            return [None] * len(self.cells)
        if len(given) != len(self.cells):
            raise ValueError(
                f"initial_state must have the states of {len(self.cells)} cells, got "
                f"{describe(given)}."
            )
        return given

    @nn.nowrap
    def compute_mask(self, inputs, mask):
        """The mask of the output, or of all outputs if there are several."""
        masks = self.cells[-1].compute_mask(inputs, mask)
        return (masks[0], *[None] * len(self.cells)) if self.return_state else masks[0]


def _call(layer: nn.Module, sequences, **options):
    """Calls a layer with those of the options that it takes and that are given."""
    takes = parameters(type(layer))
    given = {name: value for name, value in options.items() if value is not None}
    return layer(sequences, **{name: given[name] for name in given if name in takes})


def _halves(states):
    if states is None:
        return None, None
    half = len(states) // 2
    return states[:half], states[half:]
