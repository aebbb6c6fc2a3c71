import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdjax
from helpers import integers, normal, numpy_dense, x64

sizes = st.integers(1, 5)
leads = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(lead=leads, in_features=sizes, features=sizes, use_bias=st.booleans())
def test_dense_agrees_with_a_float64_loop(lead, in_features, features, use_bias):
    params = tdjax.init_dense(
        jax.random.key(0),
        in_features,
        features,
        use_bias=use_bias,
        bias_init=jax.nn.initializers.normal(),
    )
    x = normal(1, *lead, in_features)
    np.testing.assert_allclose(
        tdjax.dense(params, x), numpy_dense(params, x), rtol=1e-5, atol=1e-5
    )


@given(
    lead=leads,
    timesteps=st.integers(1, 4),
    in_features=sizes,
    features=sizes,
    use_bias=st.booleans(),
)
def test_the_wider_families_write_the_same_function(
    lead, timesteps, in_features, features, use_bias
):
    params = {"kernel": integers(2, in_features, features)}
    if use_bias:
        params["bias"] = integers(3, features)
    x = integers(1, *lead, timesteps, in_features)
    want = numpy_dense(params, x)
    per_step = tdjax.as_per_step(params, timesteps)
    np.testing.assert_array_equal(tdjax.per_step_dense(per_step, x), want)
    for wide in (
        tdjax.as_flatten(params, timesteps),
        tdjax.as_flatten(per_step, timesteps),
    ):
        np.testing.assert_array_equal(tdjax.flatten_dense(wide, x), want)


def test_as_flatten_is_the_kronecker_product_with_the_identity():
    kernel = integers(0, 3, 5)
    flat = tdjax.as_flatten({"kernel": kernel}, 4)
    np.testing.assert_array_equal(flat["kernel"], np.kron(np.eye(4), kernel))
    assert set(flat) == {"kernel"}


def test_as_flatten_keeps_zeros_beside_inf_and_nan():
    kernel = jnp.array([[jnp.inf, jnp.nan]])
    flat = tdjax.as_flatten({"kernel": kernel}, 2)["kernel"]
    np.testing.assert_array_equal(flat[0, 2:], [0, 0])


def test_flatten_and_per_step_dense_agree_with_a_float64_loop(key):
    x = normal(1, 2, 4, 3)
    flat = tdjax.init_flatten_dense(key, 4, 3, 5)
    want = numpy_dense(flat, np.reshape(x, (2, 12))).reshape(2, 4, 5)
    np.testing.assert_allclose(tdjax.flatten_dense(flat, x), want, rtol=1e-5, atol=1e-5)
    own = tdjax.init_per_step_dense(key, 4, 3, 5, bias_init=jax.nn.initializers.ones)
    steps = [
        numpy_dense({"kernel": own["kernel"][t], "bias": own["bias"][t]}, x[:, t])
        for t in range(4)
    ]
    np.testing.assert_allclose(
        tdjax.per_step_dense(own, x), np.stack(steps, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "int8"])
def test_dtypes_follow_jax_promotion_as_in_flax(key, dtype):
    x = integers(0, 2, 3).astype(dtype)
    for param_dtype in ("bfloat16", "float32"):
        layer = nn.Dense(4, param_dtype=param_dtype)
        variables = layer.init(key, x)
        y = tdjax.dense(variables["params"], x)
        want = layer.apply(variables, x)
        assert y.dtype == want.dtype == jnp.promote_types(dtype, param_dtype)
        np.testing.assert_array_equal(y, want)


def test_float64_stays_float64_under_x64(key):
    with x64():
        params = tdjax.init_dense(key, 3, 4, dtype=jnp.float64)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
        y = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))(params, x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, numpy_dense(params, x), rtol=1e-13)


def test_initial_values_are_those_of_flax_in_law(key):
    params = tdjax.init_dense(key, 400, 300)
    flax_kernel = nn.Dense(300).init(key, jnp.ones((1, 400)))["params"]["kernel"]
    spread = float(jnp.std(flax_kernel))
    assert float(jnp.std(params["kernel"])) == pytest.approx(spread, rel=0.02)
    own = tdjax.init_per_step_dense(key, 3, 400, 300)["kernel"]
    np.testing.assert_allclose(jnp.std(own, (1, 2)), spread, rtol=0.02)


@pytest.mark.parametrize("init", [tdjax.init_flatten_dense, tdjax.init_per_step_dense])
def test_bias_none_and_absent_mean_no_bias(key, init):
    apply = tdjax.flatten_dense if "flatten" in init.__name__ else tdjax.per_step_dense
    params = init(key, 2, 3, 4, use_bias=False)
    assert set(params) == {"kernel"}
    x = normal(0, 2, 3)
    np.testing.assert_array_equal(apply(params, x), apply({**params, "bias": None}, x))


KERNEL = jnp.ones((3, 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: tdjax.dense({"kernel": KERNEL}, jnp.ones((2, 4))),
            ValueError,
            r"x must have in_features = 3 on axis -1 .* float32\[3,5\], got float32\[2,4\]",
        ),
        (lambda: tdjax.dense(KERNEL, jnp.ones(3)), TypeError, r"params must be a dict"),
        (
            lambda: tdjax.dense({"w": KERNEL}, jnp.ones(3)),
            ValueError,
            r"params must have the key 'kernel' .* got \['w'\]",
        ),
        (
            lambda: tdjax.dense({"kernel": KERNEL, "scale": 1}, jnp.ones(3)),
            ValueError,
            r"got \['kernel', 'scale'\]",
        ),
        (
            lambda: tdjax.dense({"kernel": KERNEL, "bias": jnp.ones(3)}, jnp.ones(3)),
            ValueError,
            r"params\['bias'\] must have shape .* = \(5,\) .* got float32\[3\]",
        ),
        (
            lambda: tdjax.dense({"kernel": jnp.ones((2, 3, 5))}, jnp.ones(3)),
            ValueError,
            r"params\['kernel'\] must have shape \(in_features, features\), got "
            r"float32\[2,3,5\]",
        ),
        (
            lambda: tdjax.dense({"kernel": KERNEL}, [1.0, 2.0, 3.0]),
            TypeError,
            r"x must be an array \(\.\.\., in_features\), got list",
        ),
        (
            lambda: tdjax.dense({"kernel": KERNEL}, jnp.float32(1)),
            ValueError,
            r"x must have shape \(\.\.\., in_features\), got float32\[\]",
        ),
        (
            lambda: tdjax.flatten_dense(
                {"kernel": jnp.ones((12, 20))}, jnp.ones((5, 3))
            ),
            ValueError,
            r"timesteps \* in_features == 12 .* got float32\[5,3\].* use dense",
        ),
        (
            lambda: tdjax.per_step_dense(
                {"kernel": jnp.ones((4, 3, 5))}, jnp.ones((2, 6, 3))
            ),
            ValueError,
            r"x must have timesteps = 4 on axis -2 .* got float32\[2,6,3\]",
        ),
        (
            lambda: tdjax.as_flatten({"kernel": jnp.ones((4, 3, 5))}, 6),
            ValueError,
            r"timesteps must be 4 .* float32\[4,3,5\], got 6",
        ),
        (
            lambda: tdjax.as_per_step({"kernel": jnp.ones((4, 3, 5))}, 4),
            ValueError,
            r"params\['kernel'\] must have shape \(in_features, features\)",
        ),
        (
            lambda: tdjax.as_per_step({"kernel": KERNEL}, 2.0),
            TypeError,
            r"timesteps must be a positive int, got float",
        ),
        (
            lambda: tdjax.init_dense(jax.random.key(0), 0, 3),
            ValueError,
            r"in_features must be a positive int, got 0",
        ),
        (
            lambda: tdjax.init_flatten_dense(jax.random.key(0), True, 3, 3),
            TypeError,
            r"timesteps must be a positive int, got bool",
        ),
        (
            lambda: tdjax.init_per_step_dense(jax.random.key(0), 3, 3, -1),
            ValueError,
            r"features must be a positive int, got -1",
        ),
    ],
)
def test_bad_input_names_the_argument_and_the_shapes(user_errors, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sizes_of_few_bits_do_not_wrap_around(user_errors, key):
    params = tdjax.init_flatten_dense(key, np.int8(100), 3, np.uint8(2))
    assert params["kernel"].shape == (300, 200)
