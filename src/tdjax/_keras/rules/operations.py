"""Rules for the operations of functional models: `x + y`, `x[:, -1]`, `ops.mean(x)`."""

import functools
import re
from typing import Any

from keras.src import ops  # Keras gives their classes no public names
from keras.src.activations import activations

from tdjax._keras.modules.operations import Operation
from tdjax._keras.registry import register_rule
from tdjax._keras.rules.layers import Converted

_PLAIN = """
    Add Subtract Multiply Divide TrueDivide FloorDivide Mod Power Negative Absolute
    Maximum Minimum Less LessEqual Greater GreaterEqual Equal NotEqual
    LogicalAnd LogicalOr LogicalNot LogicalXor Where GetItem Matmul StopGradient
    Square Sqrt Exp Expm1 Log Log1p Sin Cos Tanh Sign
    Relu Relu6 Sigmoid LogSigmoid HardSigmoid Silu HardSilu Softplus Softsign Selu
"""
_REDUCTION = {"axis": "axis", "keepdims": "keepdims"}
_EXTREMUM = {**_REDUCTION, "initial": "initial"}
_AXIS = {"axis": "axis"}
_DTYPE = {"dtype": "dtype"}
# The attributes of the operation, and what JAX calls them.
_OPTIONS = {
    **dict.fromkeys(("Mean", "Sum", "Var", "Std", "Any", "All"), _REDUCTION),
    **dict.fromkeys(("Max", "Min"), _EXTREMUM),
    "Prod": {**_REDUCTION, **_DTYPE},
    **dict.fromkeys(("Squeeze", "ExpandDims", "Concatenate", "Stack", "Flip"), _AXIS),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _AXIS),
    "Reshape": {"newshape": "shape"},
    "BroadcastTo": {"shape": "shape"},
    "Transpose": {"axes": "axes"},
    "Swapaxes": {"axis1": "axis1", "axis2": "axis2"},
    "Roll": {"shift": "shift", "axis": "axis"},
    "Repeat": {"repeats": "repeats", "axis": "axis"},
    "Tile": {"repeats": "reps"},
    "Clip": {"x_min": "min", "x_max": "max"},
    **dict.fromkeys(("Cast", "ZerosLike", "OnesLike"), _DTYPE),
    "LeakyRelu": {"negative_slope": "negative_slope"},
    "Elu": {"alpha": "alpha"},
    "Gelu": {"approximate": "approximate"},
}


def _convert(names: dict[str, str], operation: Any) -> Converted:
    function = _snake_case(type(operation).__name__)
    # Where an operation has no such attribute, it is an argument of the call.
    values = {
        b: getattr(operation, a) for a, b in names.items() if hasattr(operation, a)
    }
    return Operation(function, tuple(_hashable(values).items())), {}


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _hashable(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


for _name in _PLAIN.split():
    register_rule(getattr(ops, _name))(functools.partial(_convert, {}))
for _name, _names in _OPTIONS.items():
    register_rule(getattr(ops, _name))(functools.partial(_convert, _names))


@register_rule(activations.ReLU)
def convert_relu(operation: Any) -> Converted:
    names = ("negative_slope", "max_value", "threshold")
    return Operation(
        "relu", tuple((name, getattr(operation, name)) for name in names)
    ), {}
