"""Keras, the drop-in and the Flax module: outputs, gradients, one training step."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras import layers

import tdjax.keras
from helpers import slow_but
from keras_zoo import ZOO, inputs

RATE = 0.1
TOLERANCE = 1e-5


def assert_close(got, wanted, tolerance=TOLERANCE):
    """Relative to the largest value of an array, and to 0.1 where all are smaller."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        scale = max(np.abs(b).max(initial=0.0), 0.1)
        assert np.abs(a - b).max(initial=0.0) <= tolerance * scale


def build(name, wrapper):
    # So that layers that are given no name, or no seed, have the same in each model.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    return ZOO[name].build(wrapper)


@functools.cache
def models(name):
    """`(Keras' own, the drop-in)`, with the same weights, none of them zero."""
    theirs = build(name, layers.TimeDistributed)
    ours = build(name, tdjax.keras.TimeDistributed)
    draw = np.random.default_rng(1)
    weights = [
        abs(w) + draw.uniform(0.1, 0.3, w.shape) if w.ndim == 1 else w
        for w in theirs.get_weights()
    ]
    for model in (theirs, ours):
        model.set_weights([np.asarray(w, "float32") for w in weights])
    return theirs, ours


def keras_program(model, argnums):
    """`(outputs, variables after, loss, gradients)` of training, compiled."""
    variables = model.trainable_variables, model.non_trainable_variables

    def loss(trainable, x, others):
        y, after = model.stateless_call(trainable, others, x, training=True)
        return score(y), (y, after)

    values = [[v.value for v in each] for each in variables]
    derive = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))
    return lambda x: derive(values[0], x, values[1])


def score(y):
    return sum(jnp.mean(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(y))


def values_by_variable(model, tree):
    """What stands in a tree of Flax, by the Keras variable that it belongs to."""
    _, places = tdjax.keras.convert_layer(model)
    pairs = zip(jax.tree.leaves(places), jax.tree.leaves(tree), strict=True)
    return {id(variable): value for variable, value in pairs}


def flax_program(module, variables, argnums):
    def loss(params, x):
        collections = {**variables, "params": params}
        y, after = module.apply(collections, x, train=True, mutable=["batch_stats"])
        return score(y), (y, after)

    derive = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))
    return lambda x: derive(variables["params"], x)


@pytest.mark.parametrize("name", ZOO)
def test_outputs_gradients_and_statistics_agree(name):
    theirs, ours = models(name)
    x, entry = inputs(ZOO[name]), ZOO[name]
    module, variables = tdjax.keras.to_flax(theirs)
    wanted = theirs.predict_on_batch(x)
    assert_close(ours.predict_on_batch(x), wanted)
    assert_close(jax.jit(module.apply)(variables, x), wanted)

    argnums = (0,) if entry.tokens else (0, 1)
    (loss, (y, after)), grads = keras_program(theirs, argnums)(x)
    assert_close(keras_program(ours, argnums)(x), ((loss, (y, after)), grads))
    if entry.noisy:
        return
    got, flax_grads = flax_program(module, variables, argnums)(x)
    assert_close((got[0], got[1][0]), (loss, y))
    assert_close(flax_grads[1:], grads[1:])
    found = values_by_variable(theirs, {"params": flax_grads[0], **got[1][1]})
    pairs = [*zip(theirs.trainable_variables, grads[0])]
    pairs += [
        (v, value)
        for v, value in zip(theirs.non_trainable_variables, after)
        if v.dtype == "float32"
    ]
    assert_close([found[id(v)] for v, _ in pairs], [value for _, value in pairs])


QUIET = [name for name in ZOO if not ZOO[name].noisy]


@pytest.mark.parametrize("name", slow_but(range(2, len(QUIET), 4), QUIET))
def test_a_training_step_moves_all_three_alike(name):
    theirs, ours = (copy_of(name, model) for model in models(name))
    x = inputs(ZOO[name])
    y = jax.tree.map(np.cos, theirs.predict_on_batch(x))
    module, variables = tdjax.keras.to_flax(theirs)
    losses = []
    for model in (theirs, ours):
        model.compile(keras.optimizers.SGD(RATE), "mse")
        losses.append(model.train_on_batch(x, y, return_dict=True)["loss"])

    def loss(params):
        collections = {**variables, "params": params}
        (outputs, masks), after = module.apply(
            collections, x, train=True, return_mask=True, mutable=["batch_stats"]
        )
        as_list = lambda tree: jax.tree.leaves(tree, is_leaf=lambda x: x is None)
        return sum(
            map(mean_square, as_list(outputs), as_list(y), as_list(masks))
        ), after

    derive = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (flax_loss, after), grads = derive(variables["params"])
    optimizer = optax.sgd(RATE)
    updates, _ = optimizer.update(grads, optimizer.init(variables["params"]))
    moved = {"params": optax.apply_updates(variables["params"], updates), **after}
    back = copy_of(name, theirs)
    tdjax.keras.from_flax(moved, back)
    assert_close([*losses, flax_loss], [losses[0]] * 3)
    assert_close(ours.get_weights(), theirs.get_weights())
    assert_close(back.get_weights(), theirs.get_weights())


def copy_of(name, model):
    """Another model with the same weights, so that it can be trained."""
    made = build(name, layers.TimeDistributed)
    if any(
        type(each) is tdjax.keras.TimeDistributed for each in model._flatten_layers()
    ):
        tdjax.keras.replace_time_distributed(made)
    made.set_weights(model.get_weights())
    return made


def mean_square(y, wanted, mask):
    if mask is None:
        return jnp.mean((y - wanted) ** 2)
    return tdjax.masked_mean(jnp.mean((y - wanted) ** 2, -1), mask)


# Golden numbers


def summary(*parts):
    model = keras.Sequential([*parts])
    return model.output_shape, model.count_params()


@pytest.mark.parametrize("wrap", [layers.TimeDistributed, tdjax.keras.TimeDistributed])
def test_golden_shapes_and_parameters(wrap):
    shape = keras.Input
    assert summary(shape((50, 10)), layers.Dense(5)) == ((None, 50, 5), 55)
    assert summary(shape((50, 10)), wrap(layers.Dense(5))) == ((None, 50, 5), 55)
    gru = layers.GRU(16, return_sequences=True, reset_after=False)
    assert summary(shape((64, 15)), gru) == ((None, 64, 16), 1536)
    assert summary(shape((64, 16)), wrap(layers.Dense(15))) == ((None, 64, 15), 255)
    video = summary(shape((10, 299, 299, 3)), wrap(layers.Conv2D(64, 3)))
    assert video == ((None, 10, 297, 297, 64), 1792)
    chain = summary(shape((10, 16)), wrap(layers.Dense(8)), wrap(layers.Dense(32)))
    assert chain == ((None, 10, 32), 136 + 288)


@pytest.mark.parametrize(
    ("name", "count"),
    [("golden tagger", 1536 + 255), ("golden classifier", 1536 + 136)],
)
def test_golden_models_keep_their_parameters_in_flax(name, count):
    _, variables = tdjax.keras.to_flax(models(name)[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_a_wrapped_dense_is_the_plain_one_to_the_last_bit_on_integers():
    x = np.arange(6 * 4, dtype="float32").reshape(2, 3, 4)
    dense = layers.Dense(2)
    wrapped = tdjax.keras.TimeDistributed(dense)
    wrapped.build(x.shape)
    kernel = np.arange(8, dtype="float32").reshape(4, 2)
    dense.set_weights([kernel, np.ones(2, "float32")])
    assert wrapped.count_params() == 10
    wanted = np.tensordot(x, kernel, [[2], [0]]) + 1
    np.testing.assert_array_equal(wrapped(x), wanted)
    np.testing.assert_array_equal(dense(x), wanted)
