"""Keras' activation functions beside their JAX counterparts."""

import functools
import pickle

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from helpers import normal
from tdjax._keras.modules.activations import FUNCTIONS
from tdjax._keras.rules.activations import activation

X = 5 * normal(0, 5, 8)
OPTIONS = {"threshold": {"threshold": 0.3, "default_value": -1.0}}
# In order: all of Keras', but for one that is refused.
NAMES = sorted(set(FUNCTIONS) & set(dir(keras.activations)))


def assert_same(function, **options):
    own = activation(function, "layer")
    for run in (function, own):
        assert run(X, **options).dtype == jnp.float32
    np.testing.assert_allclose(own(X, **options), function(X, **options), 1e-6, 1e-6)
    slope = lambda run: jax.grad(lambda x: (run(x, **options) ** 2).sum())(X)
    np.testing.assert_allclose(slope(own), slope(function), 1e-5, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_function_is_that_of_keras_and_is_pickled(name):
    function = getattr(keras.activations, name)
    assert_same(function, **OPTIONS.get(name, {}))
    own = activation(function, "layer")
    assert pickle.loads(pickle.dumps(own)) == own
    assert hash(pickle.loads(pickle.dumps(own))) == hash(own)


def test_every_function_of_keras_but_sparsemax_is_known():
    own = {
        function.__name__
        for function in vars(keras.activations).values()
        if callable(function)
    }
    assert own - set(FUNCTIONS) == {"get", "serialize", "deserialize", "sparsemax"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relu", {"negative_slope": 0.1}),
        ("relu", {"max_value": 2.0}),
        ("relu", {"max_value": 6}),
        ("relu", {"threshold": 1.0}),
        ("relu", {"negative_slope": 0.1, "max_value": 2.0, "threshold": 0.5}),
        ("leaky_relu", {"negative_slope": 0.3}),
        ("elu", {"alpha": 0.3}),
        ("gelu", {"approximate": True}),
        ("softmax", {"axis": 0}),
        ("hard_shrink", {"threshold": 0.2}),
    ],
)
def test_options_of_a_partial_function_count(name, options):
    function = getattr(keras.activations, name)
    assert_same(functools.partial(function, **options))
    assert not np.allclose(function(X), function(X, **options))


@pytest.mark.parametrize("name", ["relu", "gelu", "leaky_relu", "elu", "silu", "exp"])
def test_operations_have_their_own_defaults(name):
    assert_same(getattr(keras.ops, name))


def test_function_of_the_users_own_is_used_as_it_is():
    own = lambda x: x + 1
    assert activation(own, "layer") is own
    assert activation(jax.nn.relu, "layer") is jax.nn.relu


def test_none_is_no_activation():
    assert activation(None, "layer")(3) == 3


def test_layer_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"'a' \(Dense\): .* function, got .*LeakyReLU"):
        activation(keras.layers.LeakyReLU(), "'a' (Dense)")


def test_function_without_a_counterpart_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"'a' \(Dense\): .*activations\.sparsemax"):
        activation(keras.activations.sparsemax, "'a' (Dense)")
