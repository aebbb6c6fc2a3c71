"""Runs a Keras model and its conversion side by side."""

import jax
import jax.numpy as jnp
import keras

from helpers import assert_trees_close, normal
from tdjax.keras import convert_layer, to_flax

NOISE = jax.random.key(3)


def sequential(*layers, shape, dtype=None):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def vary(model):
    """Weights that are none of them zero or one; variances stay positive."""
    for place, weight in enumerate(model.weights):
        if "seed" not in weight.path:
            weight.assign(weight + 0.3 * jnp.abs(normal(place, *weight.shape)))
    return model


def score(outputs):
    """Weighs every number of every output differently."""
    leaves = jax.tree.leaves(outputs)
    return sum(
        jnp.sum(jnp.sin(i + 1 + jnp.arange(y.size)) * y.ravel() ** 2 + y.ravel())
        for i, y in enumerate(leaves)
    )


def assert_parity(model, x, train=False, tolerance=1e-5, **kwargs):
    """Same outputs, statistics and gradients by weights and floating inputs.

    The weights are varied first. Returns the module and its variables.
    """
    module, variables = to_flax(vary(model))
    tree = convert_layer(model)[1]
    weights = model.trainable_variables, model.non_trainable_variables
    trainable, kept = ([v.value for v in group] for group in weights)
    floats, others = _floats(x)

    def of_keras(trainable, floats):
        inputs = _merge(floats, others)
        y, after = model.stateless_call(
            trainable, kept, inputs, training=train, **kwargs
        )
        return score(y), (y, after)

    def of_flax(variables, floats):
        inputs = _merge(floats, others)
        y, after = module.apply(
            variables,
            inputs,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": NOISE},
            **kwargs,
        )
        return score(y), (y, after)

    def both(trainable, variables, floats):
        grad = lambda loss: jax.grad(loss, argnums=(0, 1), has_aux=True)
        return grad(of_keras)(trainable, floats), grad(of_flax)(variables, floats)

    want, got = jax.jit(both)(trainable, variables, floats)
    (by_weight, by_input), (y, after) = want
    (by_variable, own_by_input), (own_y, own_after) = got
    assert jax.tree.structure(own_y) == jax.tree.structure(y)
    close = lambda got, want: assert_trees_close(got, want, tolerance, tolerance)
    close(own_y, y)
    close(own_by_input, by_input)
    by_id = {id(v): g for v, g in zip(weights[0] + weights[1], by_weight + after)}
    params = tree.get("params", {})
    frozen = [v for v in jax.tree.leaves(params) if not v.trainable]
    if not frozen:
        close(
            by_variable.get("params", {}), jax.tree.map(lambda v: by_id[id(v)], params)
        )
    statistics = {k: v for k, v in tree.items() if k == "batch_stats"}
    close(own_after, jax.tree.map(lambda v: by_id[id(v)], statistics))
    return module, variables


def _floats(x):
    """The floating leaves, which gradients are taken by, and the others."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, x)
    others = jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, x)
    return floats, others


def _merge(floats, others):
    either = lambda a, b: b if a is None else a
    return jax.tree.map(either, floats, others, is_leaf=lambda leaf: leaf is None)
