"""Models from .keras files; what a file would execute is refused before it is loaded."""

import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers as k
from keras import ops

from helpers import assert_trees_equal, normal
from parity.keras_parity import sequential, vary
from tdjax._keras import file
from tdjax.keras import to_flax

pytestmark = pytest.mark.usefixtures("user_errors")


def small_model():
    left, right = keras.Input((4, 3), name="left"), keras.Input((4,), dtype="int32")
    inner = sequential(k.Dense(3, "gelu"), k.LayerNormalization(), shape=(3,))
    embedded = k.Embedding(5, 3, mask_zero=True)(right)
    both = k.Concatenate()([k.TimeDistributed(inner)(left), embedded])
    outputs = k.Bidirectional(k.GRU(2))(both)[:, :3] * 2.0
    outputs = keras.activations.relu(outputs + ops.mean(left, axis=1))
    return keras.Model([left, right], outputs)


def test_a_file_gives_the_same_module_as_the_model(tmp_path):
    model = vary(small_model())
    model.compile("adam", "mse")
    path = tmp_path / "model.keras"
    model.save(path)
    module, variables = to_flax(model)
    x = [normal(1, 2, 4, 3), jnp.array([[1, 2, 0, 0], [3, 1, 2, 4]], jnp.int32)]
    for given in (path, str(path)):
        loaded, values = to_flax(given)
        assert_trees_equal(values, variables)
    both = jax.jit(lambda v, x: (loaded.apply(v, x), module.apply(v, x)))
    assert_trees_equal(*both(variables, x))
    assert [node.name for node in loaded.graph.nodes] == [
        node.name for node in module.graph.nodes
    ]


def config_of(model, tmp_path) -> tuple[pathlib.Path, dict]:
    path = tmp_path / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        return path, json.loads(archive.read("config.json"))


def with_config(path, config):
    """The file with another config."""
    with zipfile.ZipFile(path) as archive:
        others = {
            name: archive.read(name)
            for name in archive.namelist()
            if name != "config.json"
        }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        for name, content in others.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def never_loaded(monkeypatch):
    """Fails a test in which Keras is asked to load something."""

    def load_model(*args, **kwargs):
        raise AssertionError("the file was loaded")

    monkeypatch.setattr(keras.saving, "load_model", load_model)


class Unregistered(k.Layer):
    def call(self, inputs):
        return inputs


CODE = {
    "a Lambda layer": lambda: k.Lambda(lambda x: x, name="odd"),
    "a lambda as activation": lambda: k.Dense(2, lambda x: x, name="odd"),
    "a lambda in a wrapper": lambda: k.TimeDistributed(
        k.Dense(2, lambda x: x, name="odd")
    ),
    "a layer of the user's": lambda: Unregistered(name="odd"),
    "a layer without a rule": lambda: k.EinsumDense(
        "abc,cd->abd", (None, 2), name="odd"
    ),
}


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("name", CODE)
def test_code_in_a_file_is_refused_before_it_is_loaded(name, tmp_path, never_loaded):
    model = sequential(CODE[name](), k.Dense(1), shape=(4, 3))
    path, _ = config_of(model, tmp_path)
    with pytest.raises(ValueError, match="'odd'"):
        to_flax(path)


OBJECTS = {
    "a function of Keras that reaches out": {
        "module": "keras.utils",
        "class_name": "function",
        "config": "get_file",
        "registered_name": "get_file",
    },
    "a class of Keras that is no layer": {
        "module": "keras.callbacks",
        "class_name": "LambdaCallback",
        "config": {},
        "registered_name": None,
    },
    "a class from elsewhere": {
        "module": "subprocess",
        "class_name": "Popen",
        "config": {"args": ["true"]},
        "registered_name": "Popen",
    },
    "a marshalled lambda": {"class_name": "__lambda__", "config": {"value": "4wA="}},
    "a lambda as activations have it": {"value": ["4wA=", None, None]},
    "a type": {"class_name": "__typespec__", "config": [], "spec_name": "x"},
    "a class that is no name": {"class_name": ["Dense"], "config": {}},
    "a class without a module": {"class_name": "Dense", "config": {"units": 3}},
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_anywhere_in_a_config_is_looked_at(name, tmp_path, never_loaded):
    model = sequential(k.TimeDistributed(k.Dense(2)), shape=(4, 3))
    path, config = config_of(model, tmp_path)
    inner = config["config"]["layers"][1]["config"]["layer"]["config"]
    inner["kernel_initializer"] = OBJECTS[name]
    with_config(path, json.dumps(config))
    with pytest.raises(ValueError, match="dense"):
        to_flax(path)


def test_a_registered_function_is_taken(tmp_path):
    @keras.saving.register_keras_serializable(package="tdjax-tests")
    def twice(x):
        return 2 * x

    model = sequential(k.Activation(twice), k.Dense(1), shape=(3,))
    path, _ = config_of(model, tmp_path)
    module, variables = to_flax(path)
    x = normal(1, 2, 3)
    np.testing.assert_allclose(module.apply(variables, x), model(x), 1e-6, 1e-6)


def test_the_optimizer_and_loss_of_a_file_are_left_alone(tmp_path):
    def loss(y_true, y_pred):
        return y_pred

    model = sequential(k.Dense(1), shape=(3,))
    model.compile("adam", loss)
    path, _ = config_of(model, tmp_path)
    assert_trees_equal(to_flax(path)[1], to_flax(model)[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "no readable config.json"),
        ("[" * 100_000, "no readable config.json"),
        ("[]", "describes no model"),
        ("{}", "describes no model"),
    ],
)
def test_a_file_with_a_broken_config(config, message, tmp_path):
    path, _ = config_of(sequential(k.Dense(1), shape=(3,)), tmp_path)
    with pytest.raises(ValueError, match=message):
        to_flax(with_config(path, config))


def test_a_file_without_its_weights(tmp_path):
    path, _ = config_of(sequential(k.Dense(1), shape=(3,)), tmp_path)
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
    with pytest.raises(ValueError, match="could not be loaded by Keras"):
        to_flax(path)


def test_what_is_no_keras_file(tmp_path):
    text = tmp_path / "model.keras"
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.keras"):
        to_flax(text)
    text.write_text("not a zip")
    with pytest.raises(
        ValueError, match=r"is not a \.keras file, but a file that is not a zip"
    ):
        to_flax(text)
    with pytest.raises(ValueError, match=r"is not a \.keras file, but a directory"):
        to_flax(tmp_path)
    empty = tmp_path / "empty.keras"
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        to_flax(empty)


def test_a_compiled_model_inside_and_constants_load(tmp_path):
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    inner.compile("adam", "mse", metrics=["mae"])
    start = keras.initializers.Constant([1.0, 2.0])
    head = keras.layers.Dense(2, bias_initializer=start)
    model = keras.Sequential([keras.Input((3,)), inner, head])
    model.save(tmp_path / "model.keras")
    module, variables = to_flax(tmp_path / "model.keras")
    x = np.ones((2, 3), "float32")
    np.testing.assert_allclose(module.apply(variables, x), model(x), rtol=1e-5)


@pytest.mark.parametrize("name", ["deserialize", "get", "map", "custom_gradient"])
@pytest.mark.parametrize("home", ["builtins", "keras.activations", "keras.ops"])
def test_functions_that_are_no_activations_are_refused_before_loading(home, name):
    part = {"module": home, "class_name": "function", "config": name}
    assert not file._is_known(part)
    assert not file._is_known({**part, "module": [home]})
