"""Rules for Keras models: Sequential and Functional become a `FlaxModel`."""

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import keras
import numpy as np

from tdjax._keras_graph import (
    Constant,
    FlaxModel,
    Graph,
    Input,
    Node,
    Slice,
    Slot,
    Structure,
)
from tdjax._keras_registry import (
    Variables,
    convert_layer,
    inside,
    refuse,
    register_rule,
    takes_mask,
    where,
)

# What a functional model is made of; Keras gives the class no public name.
Functional = type(keras.Model(_in := keras.Input((1,)), _in))


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


@register_rule(keras.Model)
def refuse_subclassed(model: keras.Model):
    raise TypeError(
        f"Model {where(model)} is a subclass of keras.Model with a `call` of its own, "
        "which cannot be read as a graph. Sequential and Functional models are "
        "converted; supply a rule for this class with tdjax.keras.register_rule."
    )


def _convert_graph(functional: Any, model: Any) -> tuple[FlaxModel, Variables]:
    """The graph of a functional model, with the places of `model` in errors."""
    slots = _Slots()
    specs = tuple(_input_spec(tensor, model) for tensor in functional.inputs)
    inputs = slots.structure(functional.input)
    places = {layer: i for i, layer in enumerate(model.layers, 1)}
    modules, variables, nodes = {}, {}, []
    for keras_node in calls_in_order(functional):
        layer = keras_node.operation
        if layer not in modules:
            with inside(_place(places.get(layer), model)):
                modules[layer], own = convert_layer(layer)
            _put_below(variables, layer.name, own)
        nodes.append(_make_node(keras_node, modules[layer], slots))
    outputs = slots.structure(functional.output)
    return FlaxModel(Graph(inputs, outputs, specs, tuple(nodes))), variables


def _place(number: int | None, model: Any) -> str:
    return f"layer {number} of '{model.name}'" if number else f"in '{model.name}'"


def _put_below(variables: Variables, name: str, own: Variables) -> None:
    for collection, tree in own.items():
        if tree:
            variables.setdefault(collection, {})[name] = tree


def calls_in_order(functional: Any) -> Iterator[Any]:
    """The calls of the model's operations, each after those it depends on."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        for node in functional._nodes_by_depth[depth]:
            if not node.is_input:
                yield node


def _input_spec(tensor: Any, model: Any) -> Input:
    layer = tensor._keras_history.operation
    if tensor.sparse or getattr(layer, "optional", False):
        kind = "sparse" if tensor.sparse else "optional"
        raise refuse(model, f"its input '{tensor.name}' is {kind}, which has no "
                     "counterpart in Flax.")
    return Input(layer.name, tuple(tensor.shape), tensor.dtype)


def _make_node(keras_node: Any, module: Any, slots: "_Slots") -> Node:
    layer, arguments = keras_node.operation, keras_node.arguments
    kwargs = {k: v for k, v in arguments.kwargs.items() if k != "training"}
    is_layer = isinstance(layer, keras.layers.Layer)
    return Node(
        layer.name,
        module,
        slots.structure((arguments.args, kwargs)),
        tuple(map(slots.of, keras_node.outputs)),
        takes_mask=is_layer and _gets_mask(layer, arguments.args, kwargs),
        keeps_mask=is_layer and layer.supports_masking,
        dtype=layer.compute_dtype if is_layer and layer.autocast else None,
    )


def _gets_mask(layer: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Keras hands the mask of the input on if there is no other input."""
    given = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    return takes_mask(layer) and sum(map(_has_tensor, given.values())) == 1


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(x, keras.KerasTensor) for x in jax.tree.leaves(tree))


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
