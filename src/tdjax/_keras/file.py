"""Keras models from files; what a file would create is checked before it is loaded."""

import json
import operator
import pathlib
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import keras

from tdjax._keras.modules import activations
from tdjax._keras.registry import find_rule, known_classes

# Arrays, slices and other values.
VALUES = ("keras_tensor", "tensor", "numpy", "bytes", "ellipsis", "slice")
# What the settings of a layer may contain.
PARTS = (
    keras.Initializer,
    keras.Regularizer,
    keras.constraints.Constraint,
    keras.DTypePolicy,
    keras.layers.InputLayer,
    *(keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell),
    keras.layers.StackedRNNCells,
    # A model inside was compiled with these.
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
    keras.losses.Loss,
    keras.metrics.Metric,
)
MODULES = """
    layers models initializers regularizers constraints dtype_policies losses metrics
    optimizers optimizers.schedules
"""
# Keras searches several of its modules for a function of "builtins".
FUNCTIONS = {*activations.FUNCTIONS, *activations.OPERATIONS}
HOMES = ("builtins", "keras.activations", "keras.ops")
LARGEST_CONFIG = 2**26


def load(path: pathlib.Path) -> Any:
    """Loads a `.keras` file if everything that it would create is known."""
    config = _read_config(path)
    config.pop("compile_config", None)
    for place, part in _objects(config, "the model"):
        _check(path, place, part)
    try:
        with warnings.catch_warnings():
            # A model inside may have an optimizer; the Flax module has none.
            skipped = "(?s).*Skipping variable loading for optimizer"
            warnings.filterwarnings("ignore", skipped)
            return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        cause = str(error).rpartition("Exception encountered: ")[2]
        raise ValueError(f"{path} could not be loaded by Keras: {cause}") from error


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.is_dir() or not zipfile.is_zipfile(path):
        kind = "a directory" if path.is_dir() else "a file that is not a zip archive"
        raise ValueError(
            f"{path} is not a .keras file, but {kind}. Load other formats (HDF5, "
            "SavedModel) with Keras, and pass the model."
        )
    with zipfile.ZipFile(path) as archive:
        try:
            with archive.open("config.json") as file:
                config = json.loads(file.read(LARGEST_CONFIG))
        except (KeyError, RecursionError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} has no readable config.json: {error}") from error
    if not isinstance(config, dict) or "class_name" not in config:
        raise ValueError(f"{path} has a config.json that describes no model.")
    return config


def _objects(config: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of a config that Keras would turn into objects."""
    if isinstance(config, list):
        for item in config:
            yield from _objects(item, place)
    if not isinstance(config, dict):
        return
    if set(config) == {"value"} and _is_code(config["value"]):
        # This is how Keras saves a lambda as an activation.
        config = {"class_name": "__lambda__"}
    if "class_name" in config:
        inner = config.get("config")
        name = inner.get("name") if isinstance(inner, dict) else None
        place = f"'{name}'" if isinstance(name, str) else place
        yield place, config
    for value in config.values():
        yield from _objects(value, place)


def _is_code(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, str) for item in value)


def _check(path: pathlib.Path, place: str, part: dict[str, Any]) -> None:
    name = part["class_name"]
    if name in ("Lambda", "__lambda__"):
        raise ValueError(
            f"{path}: {place} holds Python code (a Lambda layer or a lambda), which is "
            "never executed from a file. If you trust it, load the file with Keras, "
            "put a layer class with a rule in its place and pass the model."
        )
    if not _is_known(part):
        raise ValueError(
            f"{path}: {place} needs {_full_name(part)}. A file may "
            "hold Keras' own layers that have a rule, their settings, and what is "
            "registered in this process with "
            "keras.saving.register_keras_serializable. Import what registers it first; "
            "a layer also needs a rule, see tdjax.keras.register_rule."
        )


def _full_name(part: dict[str, Any]) -> str:
    module = part.get("module")
    return f"{module}.{_name(part)}" if module else str(_name(part))


def _name(part: dict[str, Any]) -> Any:
    is_function = part["class_name"] == "function"
    return part.get("config") if is_function else part["class_name"]


def _is_known(part: dict[str, Any]) -> bool:
    name, module = _name(part), part.get("module")
    if not isinstance(name, str) or not isinstance(module, str | None):
        return False
    if name.startswith("__"):
        return name.strip("_") in VALUES
    if part["class_name"] == "function":
        return _is_registered(name) or (module in HOMES and name in FUNCTIONS)
    return _is_registered(part.get("registered_name")) or _is_of_keras(module, name)


def _is_registered(name: Any) -> bool:
    known = isinstance(name, str) and keras.saving.get_registered_object(name)
    return bool(known)


def _is_of_keras(module: Any, name: str) -> bool:
    """Whether this is a class of Keras with a rule, or one that its rule reads."""
    known = {(kind.__module__, kind.__name__) for kind in known_classes()}
    if (module, name) in known:
        return True
    homes = {
        f"keras.{home}": operator.attrgetter(home)(keras) for home in MODULES.split()
    }
    homes["keras"] = keras
    kind = getattr(homes.get(module), name, None)
    if not isinstance(kind, type):
        return False
    return issubclass(kind, PARTS) or find_rule(kind) is not None
