"""The calls of a functional Keras model as its author wrote them."""

import dataclasses
import inspect
from typing import Any

import jax
import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer or operation on tensors."""

    operation: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: list


def read_call(node: Any) -> Call:
    """A node of Keras, without the arguments that Keras itself adds to a call.

    `training` is dropped: the module's own argument replaces it. Some calls have the
    mask of their input recorded as an argument, others not.
    """
    kwargs = {k: v for k, v in node.arguments.kwargs.items() if k != "training"}
    call = Call(node.operation, node.arguments.args, kwargs, node.outputs)
    without = {k: v for k, v in kwargs.items() if k != "mask"}
    plain = dataclasses.replace(call, kwargs=without)
    is_own = "mask" in kwargs and has_one_input(plain) and call.args
    return plain if is_own and _is_mask_of(kwargs["mask"], call.args[0]) else call


def has_one_input(call: Call) -> bool:
    """Whether Keras passes the mask of the input: it does to layers with one input."""
    signature = inspect.signature(call.operation.call)
    given = signature.bind(*call.args, **call.kwargs).arguments.values()
    return sum(any(map(_is_tensor, jax.tree.leaves(value))) for value in given) == 1


def _is_tensor(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor)


def _is_mask_of(mask: Any, inputs: Any) -> bool:
    own = jax.tree.map(lambda x: getattr(x, "_keras_mask", None), inputs)
    return _is_same(mask, own)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two pytrees hold the same tensors, or ones computed in the same way.

    In a model from a file, masks are computed twice: for the layer, and as recorded.
    """
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    same_tree = jax.tree.structure(a) == jax.tree.structure(b)
    return same_tree and all(map(_is_same_leaf, leaves, others))


def _is_same_leaf(a: Any, b: Any) -> bool:
    if a is b or not (_is_tensor(a) and _is_tensor(b)):
        return a is b or np.array_equal(a, b)
    one, other = (x._keras_history for x in (a, b))
    if one.operation is other.operation:
        return one[1:] == other[1:]
    return _is_same_operation(one.operation, other.operation) and _is_same(
        *(_arguments(history) for history in (one, other))
    )


def _is_same_operation(one: Any, other: Any) -> bool:
    settings = [{**x.get_config(), "name": None} for x in (one, other)]
    return type(one) is type(other) and settings[0] == settings[1]


def _arguments(history: Any) -> Any:
    arguments = history.operation._inbound_nodes[history.node_index].arguments
    return arguments.args, arguments.kwargs
