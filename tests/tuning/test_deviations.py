"""How results are compared: what may differ, and what has no scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import tdjax
from helpers import normal
from tdjax._tuning.deviations import Tolerances
from tuning.tuned_dense import QUICK


def tolerances(run, *args, given=None):
    return Tolerances(run(*args), run, args, given)


def test_rounding_of_what_vanishes_is_no_difference():
    """The gradient of a bias before a normalisation is zero, and computed it is not."""

    def by_bias(bias, x):
        loss = lambda bias: jnp.sum(jnp.sin(centred(x + bias)))
        return jax.grad(loss)(bias)

    centred = lambda y: (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5)
    bias, x = normal(0, 5), normal(1, 64, 5)
    rounding = by_bias(bias, x)
    assert 0 < jnp.abs(rounding).max() < 1e-4
    allowed = tolerances(by_bias, bias, x)
    deviation, agrees = allowed.agrees(-2 * rounding)
    assert deviation > 1
    assert agrees
    assert not allowed.agrees(rounding + 1e-2)[1]
    assert not tolerances(by_bias, bias, x, given=1e-3).agrees(-2 * rounding)[1]


def test_what_does_not_vanish_is_compared_with_its_own_scale():
    small = lambda x: 1e-7 * jnp.sin(x)
    x = normal(0, 9)
    allowed = tolerances(small, x)
    assert allowed.agrees(small(x) * (1 + 1e-5))[1]
    assert not allowed.agrees(small(x) * 1.01)[1]


def test_noise_that_double_precision_draws_otherwise_excuses_nothing():
    noisy = lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    x = normal(0, 4, 5)
    other = x * jax.random.bernoulli(jax.random.key(1), 0.5, x.shape)
    assert not tolerances(noisy, x).agrees(other)[1]


def test_what_overflows_in_half_precision_excuses_nothing():
    def overflows(x):
        return (
            jnp.sum(x, dtype=jnp.float16) * x
        )  # Infinite; with more digits it is not.

    x = jnp.full(100, 1000.0, jnp.float16)
    allowed = tolerances(overflows, x)
    assert allowed.agrees(overflows(x))[1]
    assert not allowed.agrees(x)[1]
    assert not allowed.agrees(-overflows(x))[1]


def test_a_function_of_one_dtype_is_compared_as_usual():
    def strict(x):
        assert x.dtype == jnp.float32
        return x - x

    assert tolerances(strict, normal(0, 3)).agrees(jnp.zeros(3))[1]
    assert not tolerances(strict, normal(0, 3)).agrees(jnp.ones(3))[1]


def test_shapes_and_dtypes_are_compared_first():
    allowed = tolerances(jnp.sin, normal(0, 3))
    assert allowed.has_shapes_of(jnp.ones(3))
    assert not allowed.has_shapes_of(jnp.ones(4))
    assert not allowed.has_shapes_of(jnp.ones(3, jnp.bfloat16))


@pytest.mark.slow
def test_a_convolution_with_a_bias_before_batch_norm_may_be_folded():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3,))(x))

    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(use_bias=False)(nn.Dense(1)(x))

    x = normal(0, 4, 6, 7, 4)
    for layer in (Layer(), Normalised()):
        module = tdjax.linen.TimeDistributed(layer)
        variables = module.init(jax.random.key(0), x)
        result = tdjax.linen.autotune(module, variables, x, argnums=0, **QUICK)
        verdicts = {c.verdict for c in result.candidates}
        assert verdicts <= {"measured", "behind"}
