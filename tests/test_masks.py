"""Masks of lengths, and means over the valid entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdjax
from helpers import BAD, normal, spoil, x64

B, T, F = 3, 4, 5
MASK = tdjax.lengths_to_mask(jnp.array([4, 2, 0]), T)


@given(st.integers(0, 6), st.data())
def test_lengths_to_mask_marks_the_first_steps(timesteps, data):
    lengths = data.draw(st.lists(st.integers(0, timesteps), max_size=4))
    mask = tdjax.lengths_to_mask(jnp.array(lengths, jnp.int32), timesteps)
    want = [[t < length for t in range(timesteps)] for length in lengths]
    assert mask.dtype == bool
    assert mask.shape == (len(lengths), timesteps)
    assert mask.tolist() == want


def test_a_time_major_mask_is_the_other_transposed():
    lengths = jnp.array([4, 2, 0])
    mask = tdjax.lengths_to_mask(lengths, T, time_major=True)
    assert mask.shape == (T, B)
    assert mask.T.tolist() == MASK.tolist()


def test_lengths_out_of_range_are_clipped_inside_jit():
    make = jax.jit(lambda lengths: tdjax.lengths_to_mask(lengths, 2))
    want = [[False, False], [True, True]]
    assert make(jnp.array([-3, 7])).tolist() == want
    assert make(jnp.array([0, 2**32 - 1], jnp.uint32)).tolist() == want
    with x64():
        assert make(jnp.array([-(2**32) + 1, 2**32])).tolist() == want
        assert make(jnp.array([0, 2**64 - 1], jnp.uint64)).tolist() == want


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint2"])
def test_lengths_of_few_bits_and_many_steps(dtype):
    mask = jax.jit(tdjax.lengths_to_mask, static_argnums=1)(
        jnp.array([0, 1], dtype), 300
    )
    assert mask.sum(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("lengths", "timesteps", "error", "message"),
    [
        ([1, 5], 4, ValueError, "lengths must be from 0 to timesteps = 4, got 5 at index 1"),
        ([-1, 2], 4, ValueError, "lengths must be from 0 to timesteps = 4, got -1 at index 0"),
        ([[1, 2]], 4, ValueError, r"lengths must have shape \(batch,\), got int32\[1,2\]"),
        (3, 4, ValueError, r"lengths must have shape \(batch,\), got int32\[\]"),
        ([1.0], 4, TypeError, r"lengths must be integers, got float32\[1\]"),
        ([True], 4, TypeError, r"lengths must be integers, got bool\[1\]"),
        ([1], 4.0, TypeError, r"timesteps must be an int, got float \(4.0\)"),
        ([1], -1, ValueError, "timesteps must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_errors_of_lengths(user_errors, lengths, timesteps, error, message):
    with pytest.raises(error, match=message):
        tdjax.lengths_to_mask(jnp.array(lengths), timesteps)


def test_a_list_of_lengths_is_refused_with_its_type(user_errors):
    with pytest.raises(
        TypeError, match=r"lengths must be an array \(batch,\), got list"
    ):
        tdjax.lengths_to_mask([1, 2], 3)  # type: ignore


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from(BAD), st.data())
def test_masked_mean_is_that_of_the_valid_entries(batch, time, bad, data):
    rows = st.lists(st.booleans(), min_size=time, max_size=time)
    mask = np.array(data.draw(st.lists(rows, min_size=batch, max_size=batch)), bool)
    mask = mask.reshape(batch, time)
    values = spoil(normal(0, batch, time), jnp.asarray(mask), bad)
    want = np.asarray(values)[mask].mean(dtype=np.float64) if mask.any() else 0.0
    mean = lambda values: tdjax.masked_mean(values, jnp.asarray(mask))
    np.testing.assert_allclose(mean(values), want, 1e-6, 1e-6)
    gradient = jax.grad(mean)(values)
    np.testing.assert_allclose(gradient, mask / max(mask.sum(), 1), 1e-6)


def test_masked_mean_over_an_axis_and_trailing_features():
    values = spoil(normal(0, B, T, F), MASK, np.nan)
    want = [np.mean(values[0], 0), np.mean(values[1, :2], 0), np.zeros(F)]
    np.testing.assert_allclose(tdjax.masked_mean(values, MASK, axis=1), want, 1e-5)
    total = np.concatenate([values[0], values[1, :2]]).mean()
    np.testing.assert_allclose(tdjax.masked_mean(values, MASK), total, 1e-5)


def test_masked_mean_of_integers_is_a_float_and_half_sums_in_float32():
    both = jnp.array([True, True])
    assert tdjax.masked_mean(jnp.array([1, 2]), both) == 1.5
    assert tdjax.masked_mean(np.array([1.0, 2.0]), both) == 1.5
    ones = jnp.ones(4096, jnp.bfloat16)
    mean = tdjax.masked_mean(ones, jnp.ones(4096, bool))
    assert mean.dtype == jnp.bfloat16
    assert mean == 1


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (jnp.ones((2, 3)), TypeError, r"mask must be bool, .* got float32\[2,3\]"),
        (
            jnp.ones((3, 2), bool),
            ValueError,
            r"got bool\[3,2\] for values float32\[2,3\]",
        ),
        (jnp.ones((2, 3, 1), bool), ValueError, r"got bool\[2,3,1\] for values"),
    ],
)
def test_errors_of_masked_mean(user_errors, mask, error, message):
    with pytest.raises(error, match=message):
        tdjax.masked_mean(jnp.ones((2, 3)), mask)


def test_means_of_narrow_floats_are_summed_in_float32():
    values = jnp.ones((2, 300), "float8_e4m3fn")
    mean = tdjax.masked_mean(values, jnp.ones((2, 300), bool))
    assert mean.dtype == values.dtype
    assert float(mean) == 1.0
