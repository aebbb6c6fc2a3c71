"""Functions that make Haiku modules; where there is no Haiku, nothing is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdjax
from helpers import assert_trees_close, normal

hk = pytest.importorskip("haiku")
X = normal(0, 2, 4, 3)


def transformed(fun, **options):
    """`fun` over time inside of a transform, and its parameters."""
    apply = lambda x: tdjax.time_distributed(fun, **options)(x)
    net = hk.without_apply_rng(hk.transform(apply))
    return net, net.init(jax.random.key(0), X)


@pytest.mark.parametrize("method", ["vmap", "fold", "auto"])
@pytest.mark.parametrize("out_axes", [1, (1, None)])
def test_inside_a_transform_modules_are_made_once(method, out_axes):
    def step(x):
        y = hk.Linear(5)(x)
        return y if out_axes == 1 else (y, 7.0)

    net, params = transformed(step, method=method, out_axes=out_axes)
    assert set(params) == {"linear"}
    want = X @ params["linear"]["w"] + params["linear"]["b"]
    got = net.apply(params, X)
    assert_trees_close(got if out_axes == 1 else got[0], want)


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_modules_made_outside_are_shared(method):
    def apply(x):
        layer = hk.Linear(5)
        return layer(x) - tdjax.time_distributed(layer, method=method)(x)

    net = hk.without_apply_rng(hk.transform(apply))
    params = net.init(jax.random.key(0), X)
    assert set(params) == {"linear"}
    assert_trees_close(net.apply(params, X), jnp.zeros((2, 4, 5)))


def test_fold_compares_shapes_inside_and_outside_of_a_transform():
    gram = lambda x: x @ x.T
    message = "method='fold' needs results of the shape"
    with pytest.raises(ValueError, match=message):
        transformed(gram, method="fold")
    with pytest.raises(ValueError, match=message):
        tdjax.time_distributed(gram, method="fold")(X)


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_parameters_and_state_from_outside_are_read(method):
    def apply(x):
        kernel = hk.get_parameter("kernel", [3, 3], init=hk.initializers.Constant(2.0))
        offset = hk.get_state("offset", [], init=jnp.ones)
        step = lambda x: x @ hk.get_parameter("kernel", [3, 3]) + hk.get_state("offset")
        return tdjax.time_distributed(step, method=method)(x) - x @ kernel - offset

    net = hk.without_apply_rng(hk.transform_with_state(apply))
    params, state = net.init(jax.random.key(0), X)
    assert_trees_close(net.apply(params, state, X)[0], jnp.zeros(X.shape))


def test_state_is_an_argument_that_all_steps_share():
    net = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))
    )
    variables = net.init(jax.random.key(0), X[:, 0])
    apply = tdjax.time_distributed(net.apply, in_axes=(None, None, 1), out_axes=(1, 0))
    y, states = jax.jit(apply)(*variables, X)
    steps = [net.apply(*variables, X[:, t]) for t in range(X.shape[1])]
    assert_trees_close(y, jnp.stack([y for y, _ in steps], 1))
    assert_trees_close(
        states, jax.tree.map(lambda *x: jnp.stack(x), *[s for _, s in steps])
    )


def test_each_step_may_have_a_key_of_its_own():
    net = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x))
    keys = jax.random.split(jax.random.key(0), 4)
    apply = tdjax.time_distributed(net.apply, in_axes=(None, 0, 1))
    got = apply({}, keys, jnp.ones((2, 4, 30)))
    steps = [net.apply({}, key, jnp.ones((2, 30))) for key in keys]
    np.testing.assert_array_equal(got, jnp.stack(steps, 1))
