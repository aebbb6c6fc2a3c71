"""Keras models as Flax modules with their variables, and the way back."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np

from tdjax._checks import describe, leaves_by_path, warn
from tdjax._keras import rules as rules  # registers every rule
from tdjax._keras.file import load
from tdjax._keras.registry import Variables, convert_layer


def to_flax(model: Any) -> tuple[nn.Module, Variables]:
    """Turns a Keras model into a Flax Linen module and its variables.

    `module.apply(variables, x)` gives what `model(x, training=False)` gives, and
    `module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout":
    key})` what `model(x, training=True)` gives. `x` is an array, a list or a dict, as
    the model takes its inputs; `mask=` is its mask. Submodules and variables have the
    names of the Keras layers: `variables["params"]["head"]["kernel"]`. The module can
    be pickled, compiled, differentiated and served without Keras.

    Masks go from layer to layer as in Keras. `module.init` makes new values that don't
    follow the layers' initializers. Regularizers and constraints are left out, with a
    warning. `trainable_params` says which weights the Keras model trains; a frozen
    `BatchNormalization` runs as at inference, as in Keras.

    Args:
      model: a Sequential or Functional Keras model, a single layer that has its
        weights, or the path of a `.keras` file. Code in a file is never executed: a
        file with a Lambda layer, or with anything that is neither Keras' own nor
        registered in this process, is refused before it is loaded.

    Returns:
      The module, and its variables as JAX arrays.

    Raises:
      TypeError: if a layer has no rule (see `register_rule`).
      ValueError: if the model has no weights yet, a layer has settings without a
        counterpart, or the file is not a `.keras` file that is safe to load.

    Example:
      >>> import jax, jax.numpy as jnp, keras, tdjax.keras
      >>> head = keras.layers.TimeDistributed(keras.layers.Dense(2), name="head")
      >>> model = keras.Sequential([keras.Input((5, 3)), head])
      >>> module, variables = tdjax.keras.to_flax(model)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'head': {'bias': (2,), 'kernel': (3, 2)}}}
      >>> x = jnp.ones((4, 5, 3))
      >>> bool(jnp.allclose(module.apply(variables, x), model(x)))
      True
    """
    model = _as_layer(model)
    module, tree = convert_layer(model)
    _refuse_shared(tree)
    _warn_of_penalties(model, tree)
    _warn_of_training(model)
    return module, jax.tree.map(_value, tree)


def from_flax(variables: Mapping[str, Any], model: Any) -> None:
    """Writes the variables of a converted module back into the Keras model.

    Nothing is written unless everything fits.

    Args:
      variables: a tree like that of `to_flax(model)`, such as after training.
      model: the Keras model, or another with the same layers, names and shapes.

    Raises:
      TypeError: if `model` is not a Keras model or `variables` is not a dict.
      ValueError: if a variable is missing or unknown, or a shape differs.

    Example:
      >>> import jax, keras, numpy as np, tdjax.keras
      >>> head = keras.layers.Dense(2, name="head")
      >>> model = keras.Sequential([keras.Input((3,)), head])
      >>> module, variables = tdjax.keras.to_flax(model)
      >>> doubled = jax.tree.map(lambda value: 2 * value, variables)
      >>> tdjax.keras.from_flax(doubled, model)
      >>> np.array_equal(head.kernel, doubled["params"]["head"]["kernel"])
      True
    """
    _, tree = convert_layer(_require_model(model))
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be a dict of collections, {'params': ...}, got "
            f"{describe(variables)}. to_flax returns (module, variables)."
        )
    targets, values = (
        leaves_by_path(tree),
        leaves_by_path(nn.meta.unbox(dict(variables))),
    )
    _check_paths(targets, values)
    for path, target in targets.items():
        if tuple(target.shape) != np.shape(values[path]):
            raise ValueError(
                f"variables{path} must have shape {tuple(target.shape)}, got "
                f"{describe(values[path])}."
            )
    for path, target in targets.items():
        # A copy: Keras donates the buffers of its variables when it trains.
        target.assign(np.array(values[path]))


def trainable_params(model: Any) -> Any:
    """Which parameters the Keras model trains, for an optimizer that does the same.

    Args:
      model: the model that was given to `to_flax`.

    Returns:
      A tree of bools with the structure of `to_flax(model)[1]["params"]`.

    Raises:
      TypeError, ValueError: as `to_flax`.

    Example:
      >>> import keras, tdjax.keras
      >>> base = keras.layers.Dense(2, name="base", trainable=False)
      >>> top = keras.layers.Dense(1, name="top")
      >>> model = keras.Sequential([keras.Input((3,)), base, top])
      >>> tdjax.keras.trainable_params(model)
      {'base': {'bias': False, 'kernel': False}, 'top': {'bias': True, 'kernel': True}}
    """
    _, tree = convert_layer(_require_model(model))
    return jax.tree.map(lambda variable: variable.trainable, tree.get("params", {}))


def _as_layer(model: Any) -> Any:
    if isinstance(model, str | os.PathLike):
        return load(pathlib.Path(model))
    return _require_layer(model, "a Keras model or the path of a .keras file")


def _require_model(model: Any) -> Any:
    return _require_layer(
        model, "a Keras model in memory (keras.saving.load_model reads a file)"
    )


def _require_layer(model: Any, wanted: str) -> Any:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be {wanted}, got {describe(model)}.")
    return model


def _value(variable: Any) -> jax.Array:
    return jnp.asarray(keras.ops.convert_to_numpy(variable.value))


def _check_paths(targets: dict[str, Any], values: dict[str, Any]) -> None:
    missing = [path for path in targets if path not in values]
    extra = [path for path in values if path not in targets]
    if missing or extra:
        lists = {"lacks": missing, "has no place in the model for": extra}
        parts = [f"{verb} {_listed(paths)}" for verb, paths in lists.items() if paths]
        raise ValueError(f"variables {'; '.join(parts)}.{_hint(targets, values)}")


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + more


def _hint(targets: dict[str, Any], values: dict[str, Any]) -> str:
    if {f"['params']{path}" for path in values} & set(targets):
        return " Did you mean {'params': variables}?"
    shapes = lambda leaves: sorted(map(np.shape, leaves))
    if shapes([v.value for v in targets.values()]) == shapes(values.values()):
        return (
            " The shapes agree: Keras numbers layers without a name as they are made, "
            "so give them names."
        )
    return ""


def _refuse_shared(tree: Variables) -> None:
    """Refuses a weight in two places: Flax would train it as two."""
    places: dict[int, str] = {}
    for path, variable in leaves_by_path(tree).items():
        other = places.setdefault(id(variable), path)
        if other != path:
            raise ValueError(
                f"The weight {variable.path!r} is used at two places of the model, "
                f"{other} and {path}, which Flax would train as two. Call the same "
                "layer or model twice instead, in one model."
            )


def _layers(model: Any) -> list:
    return [model, *model._flatten_layers(include_self=False)]


def _warn_of_training(model: Any) -> None:
    """Warns of layers called with training=True, as for Monte Carlo dropout."""
    names = {
        f"'{layer.name}'"
        for layer in _layers(model)
        for node in getattr(layer, "_inbound_nodes", ())
        if node.arguments.kwargs.get("training")
    }
    if names:
        warn(
            "The Flax module trains all layers or none, by `train`; in the Keras model "
            f"these were called with training=True: {', '.join(sorted(names))}.",
        )


def _warn_of_penalties(model: Any, tree: Variables) -> None:
    penalties = [
        f"{kind} of {path}"
        for path, variable in leaves_by_path(tree).items()
        for kind in ("regularizer", "constraint")
        if getattr(variable, kind, None) is not None
    ]
    penalties += [
        f"activity regularizer of '{layer.name}'"
        for layer in _layers(model)
        if getattr(layer, "activity_regularizer", None) is not None
    ]
    if penalties:
        warn(
            "The Flax module leaves out what Keras adds to the loss or does to weights "
            f"in training: {', '.join(penalties)}.",
        )
