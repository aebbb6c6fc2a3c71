"""Whole Keras models as Flax modules: graphs, the tree, errors, and the way back."""

import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras import layers as k
from keras import ops

from helpers import assert_trees_equal, normal
from parity.keras_parity import assert_parity, sequential, vary
from tdjax.keras import (
    TimeDistributed,
    from_flax,
    to_flax,
    trainable_params,
)

X, Y = normal(1, 2, 4, 3), normal(2, 2, 4, 3)


def two_inputs():
    return keras.Input((4, 3), name="left"), keras.Input((4, 3), name="right")


def tagger():
    return sequential(
        k.Embedding(9, 4, mask_zero=True, name="embedding"),
        k.Bidirectional(k.GRU(3, return_sequences=True), name="rnn"),
        k.TimeDistributed(k.Dense(5, activation="relu"), name="hidden"),
        k.BatchNormalization(name="norm"),
        k.Dropout(0.1, name="dropout"),
        k.TimeDistributed(k.Dense(2), name="head"),
        shape=(4,),
        dtype="int32",
    )


IDS = np.array([[1, 2, 3, 0], [4, 5, 0, 0]], np.int32)


def values_of(model):
    groups = model.trainable_variables, model.non_trainable_variables
    return [[variable.value for variable in group] for group in groups]


def test_the_tree_is_what_a_flax_user_would_have_written():
    module, variables = to_flax(tagger())
    shapes = jax.tree.map(jnp.shape, variables)
    assert sorted(shapes["params"]) == ["embedding", "head", "hidden", "norm", "rnn"]
    assert shapes["params"]["embedding"] == {"embedding": (9, 4)}
    assert shapes["params"]["head"] == {"kernel": (5, 2), "bias": (2,)}
    assert shapes["params"]["norm"] == {"scale": (5,), "bias": (5,)}
    assert shapes["batch_stats"] == {"norm": {"mean": (5,), "var": (5,)}}
    made = jax.eval_shape(module.init, jax.random.key(0), IDS)
    assert jax.tree.map(jnp.shape, made) == shapes


def test_names_of_flax_modules_are_fine_for_layers():
    names = "graph", "apply", "inputs", "mask", "name", "a-b.c d"
    layers = [k.Dense(3, name=name) for name in names]
    _, variables = assert_parity(sequential(*layers, shape=(4, 3)), X)
    assert set(variables["params"]) == set(names)


def test_tabulate_shows_the_layers():
    module, _ = to_flax(tagger())
    table = nn.tabulate(module, jax.random.key(0))(IDS)
    assert all(name in table for name in ("embedding", "rnn", "head", "dropout"))


def test_a_pickled_module_works_without_keras(tmp_path):
    module, variables = to_flax(vary(tagger()))
    want = np.asarray(jax.jit(module.apply)(variables, IDS))
    variables = jax.tree.map(np.asarray, variables)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((module, variables, IDS, want)))
    program = (
        "import jax, pickle, sys, numpy as np\n"
        f"file = open({str(file)!r}, 'rb')\n"
        "module, variables, ids, want = pickle.load(file)\n"
        "got = jax.jit(module.apply)(variables, ids)\n"
        "np.testing.assert_allclose(got, want, 1e-5, 1e-6)\n"
        "assert 'keras' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_modules_of_the_same_model_are_equal():
    model = tagger()
    one, other = (to_flax(model)[0] for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_module_can_be_a_static_argument():
    apply = jax.jit(lambda module, *args: module.apply(*args), static_argnums=0)
    module, variables = to_flax(tagger())
    assert apply(module, variables, IDS).shape == (2, 4, 2)


def test_inputs_and_outputs_by_name():
    left, right = two_inputs()
    outputs = {"sum": left + right, "both": [left * right, k.Dense(2)(left)]}
    model = keras.Model({"left": left, "right": right}, outputs)
    assert_parity(model, {"left": X, "right": Y})


def test_a_list_of_inputs_also_by_name():
    left, right = two_inputs()
    module, variables = to_flax(keras.Model([left, right], left - right))
    named = module.apply(variables, {"right": Y, "left": X})
    assert_trees_equal(named, module.apply(variables, [X, Y]))
    assert_trees_equal(named, module.apply(variables, (X, Y)))


def test_a_layer_used_twice_has_one_set_of_variables():
    left, right = two_inputs()
    dense = k.Dense(3, name="dense")
    model = keras.Model([left, right], k.Add()([dense(left), dense(dense(right))]))
    _, variables = assert_parity(model, [X, Y])
    assert list(variables["params"]) == ["dense"]


def test_models_in_models_share_what_they_share_in_keras():
    encoder = sequential(k.Dense(3), k.LayerNormalization(), shape=(4, 3))
    encoder.name = "encoder"
    left, right = two_inputs()
    outputs = k.Concatenate()([encoder(left), encoder(right)])
    _, variables = assert_parity(keras.Model([left, right], outputs), [X, Y])
    assert list(variables["params"]) == ["encoder"]
    assert len(variables["params"]["encoder"]) == 2


def test_operations_between_layers():
    left, right = two_inputs()
    y = (left + right) * 2.0 - left / (right**2 + 1.0)
    y = ops.mean(y, axis=1, keepdims=True) + y[:, -1:] + ops.gelu(left) - abs(right)
    y += ops.where(left > 0, left, right) + np.linspace(0, 1, 3, dtype=np.float32)
    y += keras.activations.relu(left, max_value=1.0) + ops.softmax(-left, axis=1)
    y += ops.reshape(ops.transpose(left, (0, 2, 1)), (-1, 4, 3)) @ np.eye(3, dtype="f")
    y += ops.expand_dims(ops.clip(left, -1, 1)[..., 0], -1)
    module, _ = assert_parity(keras.Model([left, right], y), [X, Y])
    assert pickle.loads(pickle.dumps(module)) == module


def test_what_a_mask_is_computed_from_is_no_part_of_the_graph():
    module, _ = to_flax(tagger())
    names = [node.name for node in module.graph.nodes]
    assert names == ["embedding", "rnn", "hidden", "norm", "dropout", "head"]


def test_training_counts_for_layers_with_a_value_of_their_own():
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, k.BatchNormalization()(inputs, training=False))
    assert_parity(model, X, train=True)
    assert_parity(model, X, train=False)


def test_half_precision_policy():
    half = {"dtype": "mixed_bfloat16"}
    layers = k.Dense(4, "relu", **half), k.LayerNormalization(**half), k.GRU(3, **half)
    model = vary(sequential(*layers, shape=(4, 3)))
    module, variables = to_flax(model)
    got = jax.jit(module.apply)(variables, X)
    want = jax.jit(lambda x: model.stateless_call(*values_of(model), x)[0])(X)
    assert got.dtype == want.dtype == jnp.bfloat16
    assert variables["params"][layers[0].name]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(got.astype("f"), want.astype("f"), 3e-2, 3e-2)


def test_the_drop_in_converts_with_its_options():
    layer = TimeDistributed(k.Dense(2), method="vmap", chunk_size=2, remat=True)
    model = sequential(layer, shape=(4, 3))
    module, _ = assert_parity(model, X)
    converted = module.graph.nodes[0].module
    assert (converted.method, converted.chunk_size, converted.remat) == (
        "vmap",
        2,
        True,
    )


def test_weights_go_back_and_forth():
    model = vary(tagger())
    module, variables = to_flax(model)
    changed = jax.tree.map(lambda value: 1.5 * value + 0.1, variables)
    from_flax(changed, model)
    assert_trees_equal(to_flax(model)[1], changed)
    want = jax.jit(lambda x: model.stateless_call(*values_of(model), x)[0])(IDS)
    got = jax.jit(module.apply)(changed, IDS)
    np.testing.assert_allclose(got, want, 1e-5, 1e-5)


def test_frozen_layers_stay_still_under_the_optimizer():
    base = k.Dense(2, name="base", trainable=False)
    model = sequential(base, k.Dense(1, name="top"), shape=(3,))
    trains = trainable_params(model)
    assert trains == {
        "base": {"kernel": False, "bias": False},
        "top": {"kernel": True, "bias": True},
    }
    params = to_flax(model)[1]["params"]
    parts = {True: optax.sgd(1.0), False: optax.set_to_zero()}
    optimizer = optax.multi_transform(parts, trains)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params))
    moved = jax.tree.map(lambda update: bool(jnp.all(update == -1)), updates)
    assert moved == trains


class Standardised(k.Conv1D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel))


class Difference(k.Add):
    def _merge_function(self, inputs):
        return inputs[0] - inputs[1]


@pytest.mark.parametrize("layer", [Standardised(2, 2), Difference()])
def test_a_subclass_that_computes_otherwise_has_no_rule(layer):
    x = keras.Input((4, 3))
    inputs = [x, x] if isinstance(layer, Difference) else x
    with pytest.raises(TypeError, match="No rule is known"):
        to_flax(keras.Model(x, layer(inputs)))


def test_options_of_operations_are_kept():
    x = keras.Input((4, 3))
    outputs = [
        keras.ops.max(x, axis=1, initial=0.5),
        keras.ops.min(x, axis=1, initial=-0.5),
        keras.ops.prod(x, axis=1, dtype="int32"),
    ]
    assert_parity(keras.Model(x, outputs), normal(0, 2, 4, 3))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (None, 1, None)])
def test_short_noise_shapes_count_from_the_last_axis(shape):
    module, variables = to_flax(sequential(k.Dropout(0.5, shape), shape=(5, 3)))
    rngs = {"dropout": jax.random.key(0)}
    y = module.apply(variables, jnp.ones((4, 5, 3)), train=True, rngs=rngs)
    kept = [i for i, size in enumerate((1,) * (3 - len(shape)) + shape) if size is None]
    varies = [i for i in range(3) if bool(jnp.any(y != y.take(jnp.array([0]), i)))]
    assert varies == kept


@pytest.mark.parametrize(
    "policies", [("float32", "mixed_bfloat16"), ("mixed_bfloat16", "float32")]
)
def test_the_wrapper_decides_the_dtype(policies):
    inner, outer = policies
    wrapped = k.TimeDistributed(k.Dense(2, dtype=inner), dtype=outer)
    model = sequential(wrapped, shape=(4, 3))
    module, variables = to_flax(model)
    x = normal(0, 2, 4, 3)
    assert module.apply(variables, x).dtype == model(x).dtype


def test_calls_with_training_are_warned_of():
    x = keras.Input((3,))
    model = keras.Model(x, k.Dropout(0.5, name="noise")(x, training=True))
    with pytest.warns(UserWarning, match="training=True: 'noise'"):
        to_flax(model)
