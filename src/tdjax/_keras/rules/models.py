"""Rules for Keras models: Sequential and Functional become a `FlaxModel`."""

from typing import Any

import jax
import keras
import numpy as np
from keras.src.models.functional import Functional

from tdjax._keras.modules.graph import (
    Constant,
    FlaxModel,
    Graph,
    Input,
    Node,
    Slice,
    Slot,
    Structure,
)
from tdjax._keras.registry import (
    Variables,
    convert_layer,
    inside,
    refuse,
    register_rule,
    takes_mask,
)
from tdjax._keras.rules.calls import Call, has_one_input, read_call


@register_rule(keras.Sequential)
def convert_sequential(model: keras.Sequential) -> tuple[FlaxModel, Variables]:
    if model._functional is None:
        raise refuse(
            model,
            "its layers are not connected yet. Give it an Input, or call it once on "
            "one array, before it is converted.",
        )
    return _convert_graph(model._functional, model)


@register_rule(Functional)
def convert_functional(model: Any) -> tuple[FlaxModel, Variables]:
    return _convert_graph(model, model)


def _convert_graph(functional: Any, model: Any) -> tuple[FlaxModel, Variables]:
    """The graph of a functional model, with the places of `model` in errors."""
    slots = _Slots()
    specs = tuple(_input_spec(tensor, model) for tensor in functional.inputs)
    inputs = slots.structure(functional.input)
    places = {layer: i for i, layer in enumerate(model.layers, 1)}
    modules, variables, nodes = {}, {}, []
    for call in _needed(functional):
        layer = call.operation
        if layer not in modules:
            with inside(_place(places.get(layer), model)):
                modules[layer], own = convert_layer(layer)
            _put_below(variables, layer.name, own)
        nodes.append(_make_node(call, modules[layer], slots))
    outputs = slots.structure(functional.output)
    return FlaxModel(Graph(inputs, outputs, specs, tuple(nodes))), variables


def _place(number: int | None, model: Any) -> str:
    return f"layer {number} of '{model.name}'" if number else f"in '{model.name}'"


def _put_below(variables: Variables, name: str, own: Variables) -> None:
    for collection, tree in own.items():
        if tree:
            variables.setdefault(collection, {})[name] = tree


def _calls_in_order(functional: Any) -> list[Call]:
    """The calls of the model's operations, each after those it depends on."""
    by_depth = functional._nodes_by_depth
    nodes = [
        node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]
    ]
    return [read_call(node) for node in nodes if not node.is_input]


def _needed(functional: Any) -> list[Call]:
    """The calls, without those that only compute a mask that Keras passes on."""
    used, needed = set(map(id, functional.outputs)), []
    for call in reversed(_calls_in_order(functional)):
        if used.intersection(map(id, call.outputs)):
            used.update(map(id, jax.tree.leaves((call.args, call.kwargs))))
            needed.append(call)
    return needed[::-1]


def _input_spec(tensor: Any, model: Any) -> Input:
    layer = tensor._keras_history.operation
    if tensor.sparse or getattr(layer, "optional", False):
        kind = "sparse" if tensor.sparse else "optional"
        raise refuse(
            model, f"its input '{tensor.name}' is {kind}; Flax has no equivalent."
        )
    return Input(layer.name, tuple(tensor.shape), tensor.dtype)


def _make_node(call: Call, module: Any, slots: "_Slots") -> Node:
    layer = call.operation
    arguments = slots.structure((call.args, call.kwargs))
    outputs = tuple(map(slots.of, call.outputs))
    if not isinstance(layer, keras.layers.Layer):
        return Node(layer.name, module, arguments, outputs)
    return Node(
        layer.name,
        module,
        arguments,
        outputs,
        takes_mask=takes_mask(layer) and has_one_input(call),
        keeps_mask=layer.supports_masking,
        dtype=layer.compute_dtype if layer.autocast else None,
    )


class _Slots:
    """Gives every Keras tensor of a model its slot."""

    def __init__(self):
        self._numbers: dict[int, int] = {}

    def of(self, tensor: Any) -> Slot:
        return Slot(self._numbers.setdefault(id(tensor), len(self._numbers)))

    def structure(self, tree: Any) -> Structure:
        leaves, treedef = jax.tree.flatten(tree)
        return Structure(treedef, tuple(map(self._freeze, leaves)))

    def _freeze(self, leaf: Any) -> Any:
        if isinstance(leaf, keras.KerasTensor):
            return self.of(leaf)
        if isinstance(leaf, slice):
            return Slice(leaf.start, leaf.stop, leaf.step)
        is_array = isinstance(leaf, np.ndarray | jax.Array) or hasattr(leaf, "numpy")
        return Constant(keras.ops.convert_to_numpy(leaf)) if is_array else leaf
