"""A model as a graph of Flax modules."""

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tdjax._checks import describe


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of the graph, by its number."""

    number: int


class Constant:
    """An array among the arguments of a node; compares by its values."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def _key(self):
        return self.value.dtype.name, self.value.shape, self.value.tobytes()

    def __eq__(self, other):
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice that can be hashed."""

    start: int | None
    stop: int | None
    step: int | None


@dataclasses.dataclass(frozen=True)
class Structure:
    """A pytree whose leaves are slots and constants."""

    treedef: Any
    leaves: tuple

    def fill(self, values: dict[Slot, Any]) -> Any:
        """The pytree with the slots' values."""
        return self.treedef.unflatten(
            [self._leaf(leaf, values) for leaf in self.leaves]
        )

    def _leaf(self, leaf, values):
        if isinstance(leaf, Slot):
            return values.get(leaf)
        if isinstance(leaf, Slice):
            return slice(leaf.start, leaf.stop, leaf.step)
        return jnp.asarray(leaf.value) if isinstance(leaf, Constant) else leaf


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the model: what is given is cast to its dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def convert(self, x: Any) -> jax.Array:
        """As an array of the dtype and rank; a last axis of size 1 comes or goes."""
        x = jnp.asarray(x, self.dtype)
        if x.ndim == len(self.shape) + 1 and x.shape[-1] == 1:
            x = x[..., 0]
        elif x.ndim == len(self.shape) - 1 and self.shape[-1] == 1:
            x = x[..., None]
        sizes = zip(x.shape, self.shape)
        if x.ndim != len(self.shape) or any(b not in (a, None) for a, b in sizes):
            raise ValueError(
                f"Input '{self.name}' must have shape {self.shape}, got {describe(x)}."
            )
        return x

    def check_mask(self, x: jax.Array, mask: Any) -> None:
        """Refuses a mask that does not fit the steps of `x`."""
        if mask is None:
            return
        shape = jnp.shape(mask)
        if not shape or shape != x.shape[: len(shape)]:
            raise ValueError(
                f"mask of input '{self.name}' must have the first axes of the input, "
                f"(batch, time), got {describe(mask)} for {describe(x)}."
            )


@dataclasses.dataclass(frozen=True)
class Node:
    """One call of a module. Nodes of the same name share its variables."""

    name: str
    module: nn.Module
    arguments: Structure
    outputs: tuple[Slot, ...]
    takes_mask: bool = False  # Whether it is given the mask of its input.
    keeps_mask: bool = False  # Whether its output has a mask.
    dtype: str | None = None  # What floating inputs are cast to.


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed."""

    inputs: Structure
    outputs: Structure
    specs: tuple[Input, ...]
    nodes: tuple[Node, ...]


class FlaxModel(nn.Module):
    """A Keras model as a Flax Linen module; `to_flax` makes it.

    Every Keras layer is a submodule of the layer's name. Call it as the Keras model: on
    an array, a list or a dict.

    Attributes:
      graph: the calls of its layers.

    Raises:
      ValueError: if inputs or masks do not fit those of the model.

    Example:
      >>> import jax.numpy as jnp, keras, tdjax.keras
      >>> layers = [keras.Input((3,)), keras.layers.Dense(2, name="head")]
      >>> module, variables = tdjax.keras.to_flax(keras.Sequential(layers))
      >>> module.apply(variables, jnp.ones((4, 3))).shape
      (4, 2)
    """

    graph: Graph

    @nn.compact
    def __call__(self, inputs, mask=None, train: bool = False, return_mask=False):
        """Runs the layers; `inputs` and `mask` are as the Keras model takes them.

        With `train` all layers train, even those called with their own `training`.
        With `return_mask` it returns `(outputs, masks)`.
        """
        graph, bound = self.graph, {}
        values, masks = _enter(graph, inputs, mask)
        for node in graph.nodes:
            if node.name not in bound:
                bound[node.name] = node.module.clone(parent=self, name=node.name)
            outputs, mask = _call(node, bound[node.name], values, masks, train)
            values.update(zip(node.outputs, jax.tree.leaves(outputs)))
            masks.update(zip(node.outputs, _leaves_or_none(mask)))
        outputs = graph.outputs.fill(values)
        return (outputs, graph.outputs.fill(masks)) if return_mask else outputs


def _enter(graph: Graph, inputs, mask) -> tuple[dict, dict]:
    leaves = _match(graph, inputs)
    values = [spec.convert(x) for spec, x in zip(graph.specs, leaves)]
    slots, masks = graph.inputs.leaves, _leaves_or_none(mask)
    for spec, x, mask in zip(graph.specs, values, masks):
        spec.check_mask(x, mask)
    return dict(zip(slots, values)), dict(zip(slots, masks))


def _match(graph: Graph, inputs) -> list:
    """The inputs in the order of the graph; they may be named where it has a list."""
    names = [spec.name for spec in graph.specs]
    treedef = graph.inputs.treedef
    leaves, given = jax.tree.flatten(inputs)
    lists = [jax.tree.structure(kind([0] * len(names))) for kind in (list, tuple)]
    if given == treedef or len(leaves) == len(names) == 1:
        return leaves
    if given in lists and treedef in lists:
        return leaves
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        return [inputs[name] for name in names]
    raise ValueError(
        f"The model takes {treedef.unflatten(names)!r}, got {describe(inputs)}."
    )


def _leaves_or_none(tree) -> list:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _call(node: Node, module, values, masks, train) -> tuple[Any, Any]:
    """The outputs of a node and their masks."""
    args, kwargs = cast(node.arguments.fill(values), node.dtype)
    arg_masks = _mask_of_first(node, masks)
    accepted = parameters(type(module))
    if node.takes_mask and "mask" in accepted and kwargs.get("mask") is None:
        kwargs["mask"] = arg_masks
    if kwargs.get("mask") is not None:
        arg_masks = kwargs["mask"]
    if "train" in accepted:
        kwargs["train"] = train
    if "return_mask" in accepted:
        return module(*args, **kwargs, return_mask=True)
    outputs = module(*args, **kwargs)
    if not node.keeps_mask:
        # Keras attaches a mask to the array: an input that is returned keeps it.
        return outputs, arg_masks if args and outputs is args[0] else None
    if hasattr(module, "compute_mask"):
        return outputs, module.compute_mask(args[0], arg_masks)
    return outputs, arg_masks


def _mask_of_first(node: Node, masks):
    args, _ = node.arguments.fill(masks)
    return args[0] if args else None


def cast(tree: Any, dtype: str | None) -> Any:
    """Floats of a tree in another dtype, if one is given."""
    if dtype is None:
        return tree
    is_float = lambda x: jnp.issubdtype(getattr(x, "dtype", jnp.int32), jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


@functools.cache
def parameters(module_class: type) -> tuple[str, ...]:
    """The parameter names of a module's `__call__`."""
    return tuple(inspect.signature(module_class.__call__).parameters)[1:]
