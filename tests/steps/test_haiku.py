"""Functions that make Haiku modules; where there is no Haiku, nothing is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdjax
from helpers import assert_trees_close, normal

hk = pytest.importorskip("haiku")
X = normal(0, 2, 4, 3)


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_inside_a_transform_modules_are_made_once(method):
    def model(x):
        return tdjax.time_distributed(lambda x: hk.Linear(5)(x), method=method)(x)

    net = hk.without_apply_rng(hk.transform(model))
    params = net.init(jax.random.key(0), X)
    assert set(params) == {"linear"}
    want = X @ params["linear"]["w"] + params["linear"]["b"]
    assert_trees_close(net.apply(params, X), want)


def test_outside_of_a_transform_fold_still_compares_shapes():
    apply = tdjax.time_distributed(lambda x: x @ x.T, method="fold")
    with pytest.raises(ValueError, match="method='fold' needs results of the shape"):
        apply(X)


def test_each_step_may_have_a_key_of_its_own():
    net = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x))
    keys = jax.random.split(jax.random.key(0), 4)
    apply = tdjax.time_distributed(net.apply, in_axes=(None, 0, 1))
    got = apply({}, keys, jnp.ones((2, 4, 30)))
    steps = [net.apply({}, key, jnp.ones((2, 30))) for key in keys]
    np.testing.assert_array_equal(got, jnp.stack(steps, 1))
