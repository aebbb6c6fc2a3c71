"""Rules for Keras' recurrent layers and what wraps them."""

from typing import Any

import flax.linen as nn
import keras

from tdjax._keras.modules.recurrent import GRU, LSTM, Recurrent, SimpleRNN
from tdjax._keras.modules.recurrent_wrappers import Bidirectional, StackedRNN
from tdjax._keras.registry import (
    Variables,
    convert_layer,
    inside,
    refuse,
    register_rule,
    where,
)
from tdjax._keras.rules.activations import activation
from tdjax._keras.rules.layers import dtypes

_MODULES: dict[type, type[Recurrent]] = {
    keras.layers.SimpleRNNCell: SimpleRNN,
    keras.layers.LSTMCell: LSTM,
    keras.layers.GRUCell: GRU,
}
_CELL_FIELDS = "units use_bias dropout recurrent_dropout implementation reset_after"
_LOOP_FIELDS = "return_sequences return_state go_backwards unroll zero_output_for_mask"


@register_rule(keras.layers.SimpleRNN)
@register_rule(keras.layers.LSTM)
@register_rule(keras.layers.GRU)
@register_rule(keras.layers.RNN)
def convert_rnn(layer: Any) -> tuple[nn.Module, Variables]:
    """Any of them is a cell in a loop."""
    _check_loop(layer)
    loop = {name: getattr(layer, name) for name in _LOOP_FIELDS.split()}
    if type(layer.cell) is keras.layers.StackedRNNCells:
        return _convert_stack(layer, loop)
    return _convert_cell(layer, layer.cell, loop)


@register_rule(keras.layers.Bidirectional)
def convert_bidirectional(layer: Any) -> tuple[nn.Module, Variables]:
    both, variables = [], {}
    for name in ("forward_layer", "backward_layer"):
        with inside(f"{name} of '{layer.name}'"):
            module, own = convert_layer(getattr(layer, name))
        both.append(module)
        for collection, tree in own.items():
            variables.setdefault(collection, {})[name] = tree
    module = Bidirectional(
        *both,
        merge_mode=layer.merge_mode,
        return_sequences=layer.return_sequences,
        return_state=layer.return_state,
        dtype=layer.compute_dtype,
    )
    return module, variables


def _convert_stack(layer: Any, loop: dict) -> tuple[nn.Module, Variables]:
    """Cells that call each other in one loop are loops that call each other."""
    cells, params = [], {}
    for place, cell in enumerate(layer.cell.cells):
        own_loop = loop | {"return_state": True}
        if place > 0:
            own_loop |= {"go_backwards": False}
        if cell is not layer.cell.cells[-1]:
            own_loop |= {"return_sequences": True}
        module, variables = _convert_cell(layer, cell, own_loop)
        cells.append(module)
        params[f"cells_{place}"] = variables["params"]
    return StackedRNN(tuple(cells), layer.return_state), {"params": params}


def _convert_cell(layer: Any, cell: Any, loop: dict) -> tuple[nn.Module, Variables]:
    _check_cell(layer, cell)
    names = [name for name in _CELL_FIELDS.split() if hasattr(cell, name)]
    fields = {name: getattr(cell, name) for name in names}
    for name in ("activation", "recurrent_activation"):
        if hasattr(cell, name):
            fields[name] = activation(getattr(cell, name), where(layer))
    params = {"kernel": cell.kernel, "recurrent_kernel": cell.recurrent_kernel}
    if cell.use_bias:
        params["bias"] = cell.bias
    module = _MODULES[type(cell)](**loop, **fields, **dtypes(cell))
    return module, {"params": params}


def _check_loop(layer: Any) -> None:
    if layer.stateful:
        raise refuse(
            layer,
            "stateful=True is not converted. Make the layer with return_state=True and "
            "hand its states on as initial_state.",
        )


def _check_cell(layer: Any, cell: Any) -> None:
    if type(cell) not in _MODULES:
        known = ", ".join(sorted(known.__name__ for known in _MODULES))
        raise refuse(
            layer,
            f"its cell is a {type(cell).__name__}; known are {known}, and stacks of "
            "them. Make the layer a class of its own and supply a rule for it with "
            "tdjax.keras.register_rule.",
        )
    if cell.compute_dtype != layer.compute_dtype:
        raise refuse(
            layer,
            f"its dtype policy computes in {layer.compute_dtype}, that of its cell "
            f"'{cell.name}' in {cell.compute_dtype}. Give both the same.",
        )
