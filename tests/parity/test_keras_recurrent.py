"""Keras' recurrent layers and what wraps them, beside their Flax modules."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from helpers import assert_trees_close, normal
from parity.keras_parity import assert_parity, score
from parity.recurrent_layers import (
    BATCH,
    FEATURES,
    LAYERS,
    MASK,
    UNITS,
    X,
    build,
    convert,
    each_layer,
)


@each_layer
@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, True),
        ({"return_sequences": True, "return_state": True, "go_backwards": True}, True),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                ({}, False),
                ({"return_sequences": True}, False),
                ({"go_backwards": True, "use_bias": False}, False),
                ({"return_sequences": True, "zero_output_for_mask": True}, True),
                ({"return_state": True, "zero_output_for_mask": True}, True),
                ({"unroll": True, "go_backwards": True}, True),
            )
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_layer_is_that_of_keras(kind, options, masked):
    layer = build(LAYERS[kind](UNITS, **options))
    assert_parity(layer, X, mask=MASK if masked else None)


@each_layer
@pytest.mark.parametrize("unroll", [False, True])
def test_initial_state_is_that_of_keras_also_before_the_first_valid_step(kind, unroll):
    layer = build(LAYERS[kind](UNITS, return_sequences=True, unroll=unroll))
    states = [normal(7 + i, BATCH, UNITS) for i in range(1 + (kind == "LSTM"))]
    assert_parity(layer, X, mask=MASK, initial_state=states)


@each_layer
def test_states_are_those_of_keras_and_carry_gradients(kind):
    layer = build(LAYERS[kind](UNITS, return_state=True))
    states = [normal(7 + i, BATCH, UNITS) for i in range(1 + (kind == "LSTM"))]
    module, variables = assert_parity(layer, X, mask=MASK, initial_state=states)
    weights = layer.trainable_variables, layer.non_trainable_variables
    weights = [[variable.value for variable in group] for group in weights]

    def of_keras(states):
        y, _ = layer.stateless_call(*weights, X, initial_state=states, mask=MASK)
        return score(y)

    def of_flax(states):
        return score(module.apply(variables, X, initial_state=states, mask=MASK))

    assert_trees_close(
        jax.grad(of_flax)(states), jax.grad(of_keras)(states), 1e-5, 1e-5
    )


@each_layer
def test_activations_are_those_of_keras(kind):
    gates = {} if kind == "SimpleRNN" else {"recurrent_activation": "hard_sigmoid"}
    assert_parity(build(LAYERS[kind](UNITS, activation="softmax", **gates)), X)


@pytest.mark.parametrize("kind", ["GRU", "GRU v1", "LSTM"])
def test_recurrent_activation_sees_one_gate_at_a_time(kind):
    assert_parity(build(LAYERS[kind](UNITS, recurrent_activation="softmax")), X)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "ave", "mul", None])
@pytest.mark.parametrize(
    ("return_sequences", "masked"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_bidirectional_is_that_of_keras(merge_mode, return_sequences, masked):
    inner = keras.layers.GRU(UNITS, return_sequences=return_sequences)
    layer = build(keras.layers.Bidirectional(inner, merge_mode=merge_mode))
    assert_parity(layer, X, mask=MASK if masked else None)


@pytest.mark.parametrize("merge_mode", ["concat", None])
def test_bidirectional_takes_and_gives_states_as_keras(merge_mode):
    inner = keras.layers.LSTM(UNITS, return_sequences=True, return_state=True)
    layer = build(keras.layers.Bidirectional(inner, merge_mode=merge_mode))
    states = [normal(7 + i, BATCH, UNITS) for i in range(4)]
    assert_parity(layer, X, mask=MASK, initial_state=states)


def test_bidirectional_with_another_backward_layer_is_that_of_keras():
    backward = keras.layers.LSTM(3, go_backwards=True, return_sequences=True)
    forward = keras.layers.SimpleRNN(UNITS, return_sequences=True)
    layer = keras.layers.Bidirectional(forward, backward_layer=backward)
    _, variables = assert_parity(build(layer), X, mask=MASK)
    assert jax.tree.map(jnp.shape, variables["params"]["backward_layer"]) == {
        "kernel": (FEATURES, 12),
        "recurrent_kernel": (3, 12),
        "bias": (12,),
    }


def test_bidirectional_of_another_dtype_casts_as_keras():
    inner = keras.layers.GRU(UNITS, dtype="float32", return_sequences=True)
    layer = keras.layers.Bidirectional(inner, dtype="bfloat16")
    module, variables = convert(layer)
    got, want = module.apply(variables, X), layer(X)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(float), want.astype(float), 1e-2, 1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_rnn_of_a_cell_is_that_of_keras(masked):
    cell = keras.layers.GRUCell(UNITS)
    layer = build(keras.layers.RNN(cell, return_sequences=True, return_state=True))
    assert_parity(layer, X, mask=MASK if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"return_sequences": True, "return_state": True, "go_backwards": True}],
    ids=["last", "all"],
)
def test_stacked_cells_are_those_of_keras(options, masked):
    cells = [keras.layers.GRUCell(UNITS), keras.layers.LSTMCell(3)]
    layer = build(keras.layers.RNN(cells, **options))
    states = [[normal(7, BATCH, UNITS)], [normal(8, BATCH, 3), normal(9, BATCH, 3)]]
    assert_parity(layer, X, mask=MASK if masked else None)
    assert_parity(layer, X, mask=MASK if masked else None, initial_state=states)


@each_layer
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
def test_mask_of_the_output_is_that_of_keras(kind, return_sequences, return_state):
    options = {"return_sequences": return_sequences, "return_state": return_state}
    layer = LAYERS[kind](UNITS, **options)
    module, _ = convert(layer)
    got, want = module.compute_mask(X, MASK), layer.compute_mask(X, MASK)
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(want)) == return_sequences
    assert (type(got) is tuple) == return_state == (type(want) is list)
    wrapped = keras.layers.Bidirectional(LAYERS[kind](UNITS, **options))
    module, _ = convert(wrapped)
    got, want = module.compute_mask(X, MASK), wrapped.compute_mask(X, MASK)
    assert (got is None) == (want is None)


@each_layer
def test_bfloat16_policy_is_that_of_keras(kind):
    options = {"dtype": "mixed_bfloat16", "return_sequences": True}
    layer = LAYERS[kind](UNITS, **options)
    module, variables = convert(layer)
    got, want = module.apply(variables, X, mask=MASK), layer(X, mask=MASK)
    assert got.dtype == want.dtype == jnp.bfloat16
    assert variables["params"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(got.astype(float), want.astype(float), 2e-2, 2e-2)
