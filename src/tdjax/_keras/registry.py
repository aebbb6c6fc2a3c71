"""The rules that turn Keras layers into Flax modules, by the layers' classes."""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import keras

from tdjax._checks import describe

Variables = dict[str, Any]
Rule = Callable[[Any], tuple[nn.Module, Variables]]
AnyRule = TypeVar("AnyRule", bound=Rule)

_RULES: dict[type, Rule] = {}
_PLACE: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "place", default=()
)
# A subclass that overrides anything else may compute something else.
_HARMLESS = {
    "build",
    "compute_output_shape",
    "compute_output_spec",
    "from_config",
    "get_config",
}


def register_rule(layer_class: type) -> Callable[[AnyRule], AnyRule]:
    """Makes the decorated function the rule by which `to_flax` converts a layer.

    A rule takes the Keras layer and returns an unbound Flax Linen module and its
    variables: a tree like Flax's own, whose leaves are all of the layer's Keras
    variables themselves, in their layout, so that `from_flax` can write into them.

    The module is called with the layer's inputs. `train` is passed if its `__call__`
    takes it, and `mask` if both it and the layer's `call` take it. A method
    `compute_mask(inputs, mask)` gives the mask of its output; without one the mask
    passes on if the Keras layer has `supports_masking`.

    A rule also holds for subclasses that override nothing that computes. The last rule
    for a class counts.

    Args:
      layer_class: a subclass of `keras.layers.Layer` (or of `keras.Operation`).

    Returns:
      A decorator that returns the rule as it is.

    Raises:
      TypeError: if `layer_class` is not such a class.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, keras, tdjax.keras
      >>> class Double(keras.layers.Layer):
      ...     def call(self, inputs):
      ...         return 2 * inputs
      >>> @tdjax.keras.register_rule(Double)
      ... def convert_double(layer):
      ...     return nn.Sequential([lambda x: 2 * x]), {}
      >>> model = keras.Sequential([keras.Input((3,)), Double()])
      >>> module, variables = tdjax.keras.to_flax(model)
      >>> module.apply(variables, jnp.ones((1, 3)))
      Array([[2., 2., 2.]], dtype=float32)
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Operation)):
        raise TypeError(
            "register_rule takes a subclass of keras.layers.Layer, got "
            f"{layer_class!r}. Use it as @register_rule(MyLayer)."
        )

    def register(rule):
        _RULES[layer_class] = rule
        return rule

    return register


def find_rule(layer_class: type) -> Rule | None:
    """The rule of the nearest class, if this one has its methods."""
    for base in layer_class.__mro__:
        if base in _RULES:
            return _RULES[base] if _means_the_same(layer_class, base) else None
    return None


def known_classes() -> tuple[type, ...]:
    """The classes for which a rule is registered."""
    return tuple(_RULES)


def _means_the_same(layer_class: type, base: type) -> bool:
    between = layer_class.__mro__[: layer_class.__mro__.index(base)]
    changed = {name for kind in between for name in vars(kind) if hasattr(base, name)}
    changed = {name for name in changed - _HARMLESS if not name.startswith("__")}
    return not changed and layer_class.__call__ is base.__call__


@contextlib.contextmanager
def inside(place: str) -> Iterator[None]:
    """Errors of conversions in this context say that they are at `place`."""
    token = _PLACE.set((place, *_PLACE.get()))
    try:
        yield
    finally:
        _PLACE.reset(token)


def where(layer: Any) -> str:
    """A layer's name, class and place in the model, as errors name it."""
    return ", ".join((f"'{layer.name}' ({type(layer).__name__})", *_PLACE.get()))


def refuse(layer: Any, reason: str) -> ValueError:
    """The error for a layer that is known, but not with these settings."""
    return ValueError(f"Layer {where(layer)}: {reason}")


def takes_mask(layer: Any) -> bool:
    """Whether the mask of its input changes what a layer computes."""
    # These read it off their inputs, without an argument for it.
    merging = keras.layers.Maximum, keras.layers.Minimum, keras.layers.Multiply
    return (
        isinstance(layer, merging) or "mask" in inspect.signature(layer.call).parameters
    )


def convert_layer(layer: Any) -> tuple[nn.Module, Variables]:
    """A Keras layer as a Flax module and the tree of its Keras variables.

    For rules of wrappers, which convert what they wrap.

    Args:
      layer: a Keras layer that has its weights.

    Returns:
      The module, and its variables: a tree with the layer's Keras variables as leaves.

    Raises:
      TypeError, ValueError: as `to_flax`.

    Example:
      >>> import keras, tdjax.keras
      >>> layer = keras.layers.Dense(2)
      >>> layer.build((None, 3))
      >>> module, variables = tdjax.keras.convert_layer(layer)
      >>> sorted(variables["params"])
      ['bias', 'kernel']
    """
    rule = find_rule(type(layer))
    if rule is None:
        raise TypeError(_unknown(layer))
    _check_convertible(layer)
    converted = rule(layer)
    _check_result(layer, converted)
    return converted


def _check_convertible(layer: Any) -> None:
    if not getattr(layer, "built", True):
        raise refuse(
            layer,
            "it has no weights yet. Give the model an Input, or call it once on data, "
            "before it is converted.",
        )
    if getattr(layer, "quantization_mode", None) is not None:
        raise refuse(layer, "quantized layers are not converted.")
    if getattr(layer, "lora_enabled", False):
        raise refuse(
            layer,
            "a layer with LoRA is not converted. Merge the two factors into its "
            "weights first: save the model, which merges them, and load it again.",
        )


def _check_result(layer: Any, converted: Any) -> None:
    pair = converted if isinstance(converted, tuple) and len(converted) == 2 else ()
    if not pair or not isinstance(pair[0], nn.Module) or not isinstance(pair[1], dict):
        raise TypeError(
            f"The rule for layer {where(layer)} must return (flax.linen.Module, dict "
            f"of variables), got {describe(converted)}."
        )
    _check_variables(layer, converted[1])


def _check_variables(layer: Any, tree: Variables) -> None:
    rule = f"The rule for layer {where(layer)}"
    for collection in tree.values():
        if not isinstance(collection, dict):
            raise TypeError(
                f"{rule} must return variables by collection, such as {{'params': "
                f"{{'kernel': layer.kernel}}}}, got {describe(tree)}."
            )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in leaves:
        if not isinstance(leaf, keras.Variable):
            raise TypeError(
                f"{rule} must give the Keras variable itself, and not its value, as "
                f"variables{jax.tree_util.keystr(path)}, got {describe(leaf)}."
            )
    covered = {id(leaf) for _, leaf in leaves}
    forgotten = [w.path for w in getattr(layer, "weights", []) if id(w) not in covered]
    if forgotten:
        raise ValueError(f"{rule} leaves out its weights {forgotten}.")


def _unknown(layer: Any) -> str:
    name, why = type(layer).__name__, ""
    if isinstance(layer, keras.Model):
        why = (
            "Sequential and Functional models are converted by their graph, which a "
            "model with a `call` of its own does not have. "
        )
    if isinstance(layer, keras.layers.Lambda):
        return (
            f"No rule is known for layer {where(layer)}, which may hold any Python "
            "code. Put a layer class of your own with a rule in its place, see "
            "tdjax.keras.register_rule."
        )
    return (
        f"No rule is known for layer {where(layer)}. {why}Supply one:\n\n"
        f"    @tdjax.keras.register_rule({name})\n"
        "    def convert(layer):\n"
        "        module = ...  # a flax.linen.Module that does what the layer does\n"
        "        return module, {'params': {'kernel': layer.kernel}}\n\n"
        "See the docstring of tdjax.keras.register_rule."
    )
