"""Which JAX function stands for an activation that a Keras layer holds."""

import functools
from collections.abc import Callable

from tdjax._checks import describe
from tdjax._keras.modules.activations import FUNCTIONS, OPERATIONS, Activation


def activation(function: Callable | None, where: str) -> Callable:
    """The JAX function for an activation that a Keras layer holds.

    Args:
      function: one of `keras.activations` or `keras.ops`, `functools.partial` of one,
        a callable of the user's own, which is used as it is, or None for none.
      where: the layer, as errors should name it.

    Returns:
      A function of one array.

    Raises:
      TypeError: if it is a Keras layer.
      ValueError: if it is a function of Keras without a counterpart here.
    """
    if function is None:
        return Activation("linear")
    if isinstance(function, functools.partial):
        inner = activation(function.func, where)
        return functools.partial(inner, *function.args, **function.keywords)
    classes = type.mro(type(function))
    if any(base.__module__.startswith("keras.") for base in classes):
        raise TypeError(
            f"{where}: an activation must be a function, got the Keras layer "
            f"{describe(function)}. Put it after this layer as a layer of its own."
        )
    return _by_name(function, where)


def _by_name(function: Callable, where: str) -> Callable:
    home, name = (getattr(function, key, "") for key in ("__module__", "__name__"))
    if not (home or "").startswith("keras."):
        return function
    if ".ops." in home and name in OPERATIONS:
        return OPERATIONS[name]
    if name not in FUNCTIONS:
        raise ValueError(
            f"{where}: no JAX function is known for the activation {home}.{name}. Wrap "
            "it in a function of your own, which is then used as it is."
        )
    return Activation(name)
