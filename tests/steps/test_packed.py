"""Packing: only the valid steps are computed, and the results go back to their places.

What holds for every mask, packed or not, is in `test_masked`.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdjax
from helpers import assert_trees_close, normal
from tdjax._steps.axes import flatten_inputs
from tdjax._steps.lowering import Lowering
from tdjax._steps.packed import PackedSteps

B, T, F = 3, 4, 5
MASK = tdjax.lengths_to_mask(jnp.array([4, 2, 0]), T)
VALID = 6
ONES = jnp.ones((B, T, F))


def td(fun, **options):
    return tdjax.time_distributed(fun, **options)


def linen(layer, **options):
    return tdjax.linen.TimeDistributed(layer, **options)


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_inside_jit_steps_beyond_capacity_are_marked_and_the_rest_is_right(method):
    kinds = lambda x: (x, x.astype(jnp.int32), x.astype(jnp.uint8))
    apply = tdjax.time_distributed(kinds, capacity=VALID - 2, method=method)
    x = jnp.arange(1.0, 1 + B * T).reshape(B, T)
    floats, signed, unsigned = jax.jit(lambda x, mask: apply(x, mask=mask))(x, MASK)
    late = np.zeros((B, T), bool)
    late[1, :2] = True  # the last two of the six, example by example
    kept = np.where(MASK & ~late, x, 0)
    np.testing.assert_array_equal(floats, np.where(late, np.nan, kept))
    np.testing.assert_array_equal(signed, np.where(late, np.iinfo(np.int32).min, kept))
    np.testing.assert_array_equal(unsigned, np.where(late, 255, kept))
    fits = jax.jit(lambda x, mask: apply(x, mask=mask))(x, MASK.at[1].set(False))
    assert np.isfinite(fits[0]).all()


def test_steps_beyond_capacity_make_the_gradient_nan_too():
    x = jnp.arange(1.0, 1 + B * T).reshape(B, T)

    def loss(weight, mask, capacity):
        apply = tdjax.time_distributed(lambda x: weight * x, capacity=capacity)
        return tdjax.masked_mean(apply(x, mask=mask), mask)

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    assert np.isnan(gradient(2.0, MASK, VALID - 1))
    np.testing.assert_allclose(gradient(2.0, MASK, VALID), np.mean(x[MASK]), 1e-6)


def test_a_bool_result_is_fine_where_every_step_has_room():
    apply = tdjax.time_distributed(lambda x: x > 0, capacity=B * T)
    y = jax.jit(lambda mask: apply(jnp.ones((B, T)), mask=mask))(MASK)
    np.testing.assert_array_equal(y, MASK)


def test_only_the_valid_steps_are_computed():
    conv = nn.Conv(4, (3, 3))
    video = normal(0, 4, 10, 8, 8, 3)
    params = conv.init(jax.random.key(0), video[:, 0])
    mask = tdjax.lengths_to_mask(jnp.array([3, 3, 3, 3]), 10)

    def flops(**options):
        apply = tdjax.time_distributed(conv.apply, in_axes=(None, 1), **options)
        loss = lambda p, x, mask: apply(p, x, mask=mask).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, video, mask).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(capacity=12, method="fold") < 0.4 * flops(method="fold")


def test_a_mask_does_not_recompile_for_the_same_shapes():
    apply = tdjax.time_distributed(lambda x: x, capacity=VALID)
    run = jax.jit(lambda x, mask: apply(x, mask=mask))
    for mask in (MASK, jnp.roll(MASK, 1, 0), MASK & False):
        run(jnp.ones((B, T)), mask)
    assert run._cache_size() == 1


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_packed_dropout_keeps_and_scales_the_valid_steps_alone(method):
    drop = nn.Dropout(0.5, deterministic=False)
    model = linen(drop, capacity=200, method=method)
    mask = tdjax.lengths_to_mask(jnp.array([50, 90]), 100)
    y = model.apply(
        {}, jnp.ones((2, 100, 8)), mask=mask, rngs={"dropout": jax.random.key(0)}
    )
    assert set(np.unique(y)) == {0.0, 2.0}
    assert not np.any(y[~mask])
    assert len({row.tobytes() for row in np.asarray(y[mask])}) > 100
    assert 0.4 < np.mean(y[mask] > 0) < 0.6


def test_a_layer_that_mixes_examples_is_refused_under_capacity():
    model = linen(nn.BatchNorm(use_running_average=False), capacity=9)
    variables = model.init(jax.random.key(0), ONES, mask=MASK)
    with pytest.raises(
        ValueError,
        match=r"capacity=9 needs a layer that treats examples .*float32\[5\].*mean",
    ):
        model.apply(variables, ONES, mask=MASK, mutable=["batch_stats"])
    norm = nnx.BatchNorm(F, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="capacity=9 needs a layer that treats examples"
    ):
        tdjax.nnx.TimeDistributed(norm, capacity=9)(ONES, mask=MASK)
    still = linen(nn.BatchNorm(use_running_average=True), capacity=9)
    assert np.isfinite(still.apply(variables, ONES, mask=MASK)).all()


def test_the_tuner_takes_a_mask_and_a_capacity():
    x = normal(0, B, T, F)
    result = tdjax.autotune(jnp.sin, x, mask=MASK, capacity=VALID, budget=1)
    want = jnp.where(MASK[..., None], jnp.sin(x), 0)
    np.testing.assert_allclose(result.tuned(x, mask=MASK), want, 1e-6)


def test_shared_noise_is_refused_under_capacity():
    drop = nn.Dropout(0.5, deterministic=False)
    message = re.escape(
        "share_rng=True gives all steps of an example the same noise; with capacity=9"
    )
    with pytest.raises(ValueError, match=message):
        linen(drop, capacity=9, share_rng=True).apply(
            {}, ONES, mask=MASK, rngs={"dropout": jax.random.key(0)}
        )


def test_a_sentence_encoder_over_documents_masks_each_level_by_its_own_lengths():
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, words, lengths):
            states = nn.RNN(nn.GRUCell(3))(words, seq_lengths=lengths)
            return states[jnp.arange(len(lengths)), jnp.maximum(lengths - 1, 0)]

    documents = normal(0, 2, 3, 4, F)  # (batch, sentences, words, features)
    words = jnp.array([[4, 2, 1], [3, 0, 0]])
    sentences = tdjax.lengths_to_mask(jnp.array([3, 1]), 3)
    spoiled = jnp.where(
        (jnp.arange(4) < words[..., None])[..., None], documents, jnp.nan
    )
    spoiled = jnp.where(sentences[..., None, None], spoiled, jnp.nan)
    filled = jnp.where(jnp.isnan(spoiled), 0, spoiled)
    plain = linen(Encoder())
    variables = plain.init(jax.random.key(0), filled, words)
    want = jnp.where(sentences[..., None], plain.apply(variables, filled, words), 0)
    packed = linen(Encoder(), capacity=4, method="fold")
    keep_words = jnp.where(sentences[..., None, None], filled, jnp.nan)
    got = packed.apply(variables, keep_words, words, mask=sentences)
    assert_trees_close(got, want)


@pytest.mark.parametrize("axis", [1, 0, -1])
def test_results_of_packed_steps_are_hidden_wherever_their_time_is(axis):
    steps = PackedSteps(flatten_inputs((ONES,), 1), MASK, Lowering(capacity=VALID + 1))
    packed = normal(0, 1, VALID + 1, F)
    want = np.zeros((B, T, F))
    want[np.asarray(MASK)] = packed[0, :VALID]
    got = steps.hide((jnp.moveaxis(packed, 1, axis), 3.0), (axis, None))
    np.testing.assert_array_equal(got[0], np.moveaxis(want, 1, axis))
    assert got[1] == 3.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: td(jnp.mean, out_axes=0, capacity=9)(ONES, mask=MASK), ValueError,
         r"capacity needs results with the batch on axis 0 .* got float32\[\]"),
        (lambda: td(abs, out_axes=4, capacity=9)(ONES, mask=MASK), ValueError,
         r"out_axes must lie within the result's 3 axes .* got 4"),
        (lambda: td(jnp.add, in_axes=(1, None), capacity=9)(ONES, ONES[:, 0], mask=MASK),
         ValueError, r"capacity needs results with the batch on axis 0 .* got float32\[3,5\]"),
        (lambda: td(abs, capacity=5)(ONES, mask=MASK), ValueError,
         "capacity=5 must be at least the number of valid steps, got a mask with 6"),
        (lambda: jax.jit(lambda x: td(abs, capacity=5)(x, mask=np.asarray(MASK)))(ONES),
         ValueError, "capacity=5 must be at least the number of valid steps"),
        (lambda: td(abs, capacity=5)(ONES), ValueError, "capacity=5 needs a mask"),
        (lambda: td(abs, capacity=0), ValueError, "capacity must be a positive int, got 0"),
        (lambda: td(abs, capacity=2.0), TypeError, r"capacity must be a positive int, got float"),
        (lambda: td(abs, capacity=2, axis_name="t"), ValueError,
         "axis_name='t' names the time axis, which capacity=2 replaces"),
        (lambda: jax.jit(lambda m: td(lambda x: x > 0, capacity=5)(ONES, mask=m))(MASK),
         TypeError, "a bool result can't show"),
    ],
)  # fmt: skip
def test_errors_of_packing(user_errors, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_float_without_nan_cannot_mark_the_steps_beyond(user_errors):
    apply = tdjax.time_distributed(lambda x: x, capacity=2)
    mask = tdjax.lengths_to_mask(jnp.array([3, 1]), 3)
    x = jnp.ones((2, 3, 2), "float4_e2m1fn")
    with pytest.raises(TypeError, match="a float4_e2m1fn result can't show"):
        jax.jit(lambda mask: apply(x, mask=mask))(mask)
    small = jnp.ones((2, 3, 2), "float8_e4m3fn")
    y = jax.jit(lambda mask: apply(small, mask=mask))(mask)
    assert np.isnan(np.asarray(y, np.float32)[0, 2]).all()


@pytest.mark.parametrize("options", [{}, {"capacity": 4}])
def test_float0_has_no_numbers_to_hide(user_errors, options):
    apply = tdjax.time_distributed(lambda x, y: y, **options)
    empty = np.zeros((2, 3, 2), jax.dtypes.float0)
    mask = tdjax.lengths_to_mask(jnp.array([3, 1]), 3)
    with pytest.raises(
        TypeError, match=r"no argument .* float0\[2,3,2\].* Leave it out"
    ):
        apply(empty, jnp.ones((2, 3, 2)), mask=mask)


@pytest.mark.parametrize("capacity", [np.int8(60), np.uint8(200), np.int64(60), 60])
def test_a_capacity_of_few_bits_does_not_wrap_around(user_errors, capacity):
    x = jnp.arange(1.0, 121.0).reshape(4, 30, 1)
    mask = tdjax.lengths_to_mask(np.array([30, 5, 3, 2]), 30)
    apply = tdjax.time_distributed(lambda x: x * 2, capacity=capacity)
    np.testing.assert_array_equal(apply(x, mask=mask), x * 2 * mask[..., None])


def test_steps_without_features_are_packed():
    mask = tdjax.lengths_to_mask(jnp.array([4, 1, 2]), 4)
    apply = tdjax.time_distributed(lambda x: x, capacity=8)
    assert apply(jnp.ones((3, 4, 0)), mask=mask).shape == (3, 4, 0)


def test_rows_that_are_not_used_see_a_valid_number():
    x = jnp.where(MASK, 2.0, 0.0)  # (batch, time): one number for each step
    packed = td(jnp.log, capacity=VALID + 2)
    gradient = jax.grad(lambda x: packed(x, mask=MASK).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.where(MASK, 0.5, 0))
    with jax.debug_nans(True), jax.debug_infs(True):
        packed(x, mask=MASK)
