"""Masks: what is in a masked step changes nothing, anywhere."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import tdjax
from helpers import assert_trees_close, assert_trees_equal, normal

B, T, F = 3, 4, 5
MASK = tdjax.lengths_to_mask(jnp.array([4, 2, 0]), T)
VALID = 6
BAD = [np.nan, np.inf, -np.inf, 3e38]
LOWERINGS = [
    {},
    {"method": "fold"},
    {"chunk_size": 3},
    {"chunk_size": 1, "remat": True},
    {"capacity": VALID},
    {"capacity": B * T + 3},
    {"capacity": VALID + 2, "method": "fold"},
    {"capacity": VALID + 1, "chunk_size": 3, "method": "fold", "remat": True},
]
lowerings = pytest.mark.parametrize("options", LOWERINGS, ids=str)


def spoil(x, mask, bad=None):
    """`bad` in every masked step, by default all of `BAD` in turn."""
    bad = jnp.resize(jnp.array(BAD, x.dtype), x.shape) if bad is None else bad
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, bad)


def unit(kernel, x):
    """A projection of length 1: its gradient is NaN where the projection is zero."""
    y = x @ kernel
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


def loop_over_valid_steps(kernel, x, mask, weights):
    """Values and gradients of `unit` in float64 NumPy, one valid step at a time."""
    kernel, x, weights = (np.asarray(a, np.float64) for a in (kernel, x, weights))
    y, of_kernel, of_x = (
        np.zeros(weights.shape),
        np.zeros_like(kernel),
        np.zeros_like(x),
    )
    for place in np.argwhere(mask):
        b, t = place
        z = x[b, t] @ kernel
        length = np.sqrt(z @ z)
        y[b, t] = z / length
        of_z = (weights[b, t] - (weights[b, t] @ y[b, t]) * y[b, t]) / length
        of_kernel += np.outer(x[b, t], of_z)
        of_x[b, t] = kernel @ of_z
    return y, (of_kernel, of_x)


def value_and_gradients(options, kernel, x, mask, weights):
    apply = tdjax.time_distributed(unit, in_axes=(None, 1), **options)
    y, pullback = jax.vjp(lambda k, x: apply(k, x, mask=mask), kernel, x)
    return y, pullback(weights)


# Lengths


@given(st.integers(0, 6), st.data())
def test_lengths_to_mask_marks_the_first_steps(timesteps, data):
    lengths = data.draw(st.lists(st.integers(0, timesteps), max_size=4))
    mask = tdjax.lengths_to_mask(jnp.array(lengths, jnp.int32), timesteps)
    want = [[t < length for t in range(timesteps)] for length in lengths]
    assert mask.dtype == bool
    assert mask.shape == (len(lengths), timesteps)
    assert mask.tolist() == want


def test_lengths_out_of_range_are_clipped_inside_jit():
    mask = jax.jit(lambda lengths: tdjax.lengths_to_mask(lengths, 2))(
        jnp.array([-3, 7])
    )
    assert mask.tolist() == [[False, False], [True, True]]


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


# Means


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


# The transform


@lowerings
def test_what_is_in_masked_steps_changes_no_value_and_no_gradient(options):
    kernel, weights = normal(1, F, 2), normal(2, B, T, 2)
    x = spoil(normal(0, B, T, F), MASK)
    want = loop_over_valid_steps(kernel, x, MASK, weights)
    # Cotangents of masked results may be NaN as well.
    cotangents = spoil(weights, MASK)
    run = functools.partial(value_and_gradients, options)
    got = run(kernel, x, np.asarray(MASK), cotangents)
    assert_trees_close(got, want)
    assert_trees_close(jax.jit(run)(kernel, x, MASK, cotangents), want)
    assert not np.any(got[0][~MASK])
    assert not np.any(got[1][1][~MASK])


@pytest.mark.slow
@settings(max_examples=10)
@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["vmap", "fold"]), st.one_of(st.none(), st.integers(1, 4)),
    st.one_of(st.none(), st.integers(0, 3)), st.sampled_from(BAD), st.data(),
)  # fmt: skip
def test_any_mask_under_any_option(batch, time, dtype, method, chunk, spare, bad, data):
    bits = data.draw(
        st.lists(st.booleans(), min_size=batch * time, max_size=batch * time)
    )
    mask = jnp.array(bits, bool).reshape(batch, time)
    capacity = None if spare is None else max(sum(bits) + spare, 1)
    kernel, x = normal(1, F, 2, dtype=dtype), normal(0, batch, time, F, dtype=dtype)
    weights = normal(2, batch, time, 2, dtype=dtype)
    options = {"method": method, "chunk_size": chunk, "capacity": capacity}
    got = value_and_gradients(options, kernel, spoil(x, mask, bad), mask, weights)
    want = loop_over_valid_steps(kernel, x, mask, weights)
    assert got[0].dtype == dtype
    tolerance = 2e-5 if dtype == "float32" else 6e-2
    as_float = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    assert_trees_close(as_float(got), want, 10 * tolerance, tolerance * batch * time)


@lowerings
def test_any_pytree_of_results_time_axes_and_kinds(options):
    def fun(inputs, shared):
        x, ids = inputs["x"], inputs["ids"]
        return {"sum": x.sum(-1) + shared, "ids": ids + 1, "even": ids % 2 == 0}

    x, ids = normal(0, T, B, F), jnp.arange(B * T).reshape(B, T).astype(jnp.uint8)
    axes = {"x": 0, "ids": 1}
    outs = {"sum": 0, "ids": -1, "even": 1}
    apply = tdjax.time_distributed(fun, in_axes=(axes, None), out_axes=outs, **options)
    got = apply({"x": x, "ids": ids}, 2.0, mask=MASK)
    want_ids = np.where(MASK, np.asarray(ids) + 1, 0)
    want = {"sum": np.where(MASK.T, x.sum(-1) + 2, 0), "ids": want_ids}
    want["even"] = np.asarray(MASK & (ids % 2 == 0))
    assert_trees_close(got, want)
    assert [y.dtype for y in jax.tree.leaves(got)] == [bool, jnp.uint8, jnp.float32]


@lowerings
def test_ids_out_of_range_at_masked_steps_do_no_harm(options):
    table = normal(0, 7, 2)
    ids = jnp.where(MASK, 3, -1000)
    look_up = lambda table, ids: table.at[ids].get(mode="fill", fill_value=jnp.nan)
    apply = tdjax.time_distributed(look_up, in_axes=(None, 1), **options)
    loss = lambda table: apply(table, ids, mask=MASK).sum()
    gradient = jax.grad(loss)(table)
    np.testing.assert_allclose(
        gradient, np.eye(7)[3][:, None] * VALID * np.ones((1, 2))
    )


@lowerings
def test_the_mask_can_be_an_input_too_one_slice_a_step(options):
    count = lambda x, present: jnp.where(present, 1, 100) * jnp.ones_like(x)
    apply = tdjax.time_distributed(count, **options)
    x = jnp.ones((B, T))
    odd = MASK.at[0, 0].set(False)
    got = apply(x, odd, mask=MASK)
    np.testing.assert_array_equal(got, jnp.where(MASK, jnp.where(odd, 1, 100), 0))


@lowerings
def test_inputs_without_a_batch_are_those_of_the_step(options):
    if options.get("method") == "fold":
        pytest.skip("fold wants a batch in every input")
    add = lambda x, place: x + place
    apply = tdjax.time_distributed(add, in_axes=(1, 0), **options)
    got = apply(jnp.zeros((B, T, F)), jnp.arange(T), mask=MASK)
    want = np.where(MASK[..., None], np.arange(T)[None, :, None], 0) * np.ones(
        (1, 1, F)
    )
    np.testing.assert_array_equal(got, want)


@lowerings
def test_masks_of_words_are_those_of_a_valid_sentence(options):
    """At a masked sentence they would be all False, and its mean 0 / 0."""
    words = (
        jnp.arange(6) < jnp.array([[4, 2, 1, 5], [3, 6, 0, 0], [0, 0, 0, 0]])[..., None]
    )
    x = normal(0, B, T, 6)
    mean = lambda w, x, words: w * jnp.where(words, x, 0).sum(-1) / words.sum(-1)
    apply = tdjax.time_distributed(mean, in_axes=(None, 1, 1), **options)
    got = jax.grad(lambda w: apply(w, x, words, mask=MASK).sum())(1.0)
    want = sum(np.mean(x[place][words[place]]) for place in zip(*np.nonzero(MASK)))
    np.testing.assert_allclose(got, want, 1e-5)


def test_inputs_of_a_masked_step_come_from_one_step():
    """Of a batch and of none: a pair of two steps may be one that no example has."""
    places = jnp.arange(float(T))
    x = jnp.broadcast_to(places, (B, T)) + 0.5
    root = lambda w, x, place: jnp.sqrt(w * x - place)
    apply = tdjax.time_distributed(root, in_axes=(None, 1, 0))
    gradient = jax.grad(lambda w: apply(w, x, places, mask=MASK).sum())(1.0)
    np.testing.assert_allclose(gradient, np.sum(x[MASK] / 2 / np.sqrt(0.5)), 1e-5)


@lowerings
def test_no_batch_and_no_steps(options):
    for shape in ((0, T, F), (B, 0, F), (0, 0, F)):
        mask = jnp.zeros(shape[:2], bool)
        apply = tdjax.time_distributed(lambda x: x[:, :2], **options)
        assert apply(jnp.zeros(shape), mask=mask).shape == (*shape[:2], 2)


@pytest.mark.slow
@lowerings
def test_masks_compose_with_vmap_scan_checkpoint_and_forward_mode(options):
    kernel, x = normal(1, F, 2), normal(0, B, T, F)
    apply = tdjax.time_distributed(unit, in_axes=(None, 1), **options)
    masks = jnp.stack([MASK, jnp.roll(MASK, 1, 0)])
    one = lambda mask: apply(kernel, spoil(x, mask, jnp.nan), mask=mask)
    want = jnp.stack([one(mask) for mask in masks])
    assert_trees_close(jax.vmap(one)(masks), want)
    assert_trees_close(jax.lax.map(one, masks), want)
    assert_trees_close(jax.checkpoint(one)(masks[0]), want[0])
    bad = spoil(x, MASK, jnp.nan)
    _, tangent = jax.jvp(lambda x: apply(kernel, x, mask=MASK), (bad,), (bad,))
    assert np.isfinite(tangent).all()


@pytest.mark.parametrize("options", [{}, {"method": "fold"}, {"capacity": 9}], ids=str)
def test_masks_export_with_symbolic_batch_and_time(options):
    apply = tdjax.time_distributed(lambda x: x * 2, **options)
    fun = jax.jit(lambda x, mask: apply(x, mask=mask))
    sizes = export.symbolic_shape("b, t")
    specs = [
        jax.ShapeDtypeStruct((*sizes, F), "float32"),
        jax.ShapeDtypeStruct(sizes, bool),
    ]
    exported = export.export(fun)(*specs)
    x = normal(0, B, T, F)
    assert_trees_equal(exported.call(x, MASK), jnp.where(MASK[..., None], x * 2, 0))


# Packing


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


# Errors

ONES = jnp.ones((B, T, F))


def td(fun, **options):
    return tdjax.time_distributed(fun, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: td(abs)(ONES, mask=MASK * 1.0), TypeError,
         r"mask must be bool, True at the valid steps, got float32\[3,4\].*lengths_to_mask"),
        (lambda: td(abs)(ONES, mask=[1]), TypeError, r"mask must be an array .* got list"),
        (lambda: td(abs)(ONES, mask=MASK[0]), ValueError,
         r"mask must have shape \(batch, time\), got bool\[4\]"),
        (lambda: td(abs)(ONES, mask=MASK[:, :2]), ValueError,
         r"mask must have shape \(batch, time\) = \(3, 4\) to go with an input "
         r"float32\[3,4,5\] with time on axis 1, got bool\[3,2\]"),
        (lambda: td(abs)(ONES, mask=MASK[:2]), ValueError, r"\(3, 4\) .* got bool\[2,4\]"),
        (lambda: td(abs, in_axes=0)(ONES, mask=MASK), ValueError,
         r"mask must have shape \(batch, time\) = \(4, 3\) .* time on axis 0"),
        (lambda: td(jnp.mean, out_axes=0)(ONES, mask=MASK), ValueError,
         r"mask needs results with the batch on axis 0 .* got float32\[\]"),
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
def test_errors_of_masks(user_errors, call, error, message):
    with pytest.raises(error, match=message):
        call()


# Flax


def linen(layer, **options):
    return tdjax.linen.TimeDistributed(layer, **options)


@lowerings
def test_linen_and_nnx_hide_masked_steps_as_the_transform_does(options):
    x, bad = normal(0, B, T, F), spoil(normal(0, B, T, F), MASK, jnp.nan)
    model = linen(nn.Dense(2), **options)
    variables = model.init(jax.random.key(0), bad, mask=MASK)
    want = tdjax.dense(variables["params"], x) * MASK[..., None]
    assert_trees_close(model.apply(variables, bad, mask=MASK), want)
    loss = lambda v: (model.apply(v, bad, mask=MASK) ** 2).sum()
    plain = lambda v: ((tdjax.dense(v["params"], x) * MASK[..., None]) ** 2).sum()
    assert_trees_close(
        jax.grad(loss)(variables), jax.grad(plain)(variables), 1e-4, 1e-5
    )

    layer = nnx.Linear(F, 2, rngs=nnx.Rngs(0))
    wrapped = tdjax.nnx.TimeDistributed(layer, **options)
    assert_trees_close(wrapped(bad, mask=MASK), layer(x) * MASK[..., None])
    gradients = nnx.grad(lambda m: (m(bad, mask=MASK) ** 2).sum())(wrapped)
    plain = nnx.grad(lambda m: ((m(x) * MASK[..., None]) ** 2).sum())(layer)
    assert_trees_close(
        jax.tree.leaves(nnx.to_pure_dict(gradients)["layer"]),
        jax.tree.leaves(nnx.to_pure_dict(plain)), 1e-4, 1e-5,
    )  # fmt: skip


class MaskedNorm(nn.Module):
    """BatchNorm over the valid examples of a step: the mask is an input of its own."""

    @nn.compact
    def __call__(self, x, mask):
        norm = nn.BatchNorm(use_running_average=False, momentum=0.5)
        return norm(x, mask=mask[:, None])


def test_statistics_come_from_valid_examples_and_steps_that_have_one():
    x = spoil(normal(0, B, T, F), MASK, jnp.nan)
    model = linen(MaskedNorm())
    variables = model.init(jax.random.key(0), x, MASK, mask=MASK)
    run = lambda mask: model.apply(
        variables, x, mask, mask=mask, mutable=["batch_stats"]
    )
    y, after = run(MASK)
    means = [np.mean(x[:2, t], 0) for t in (0, 1)] + [
        np.asarray(x[0, t]) for t in (2, 3)
    ]
    want = 0.5 * np.mean(means, 0)
    np.testing.assert_allclose(
        after["batch_stats"]["BatchNorm_0"]["mean"], want, 1e-5, 1e-6
    )
    assert np.isfinite(y).all()
    fewer = MASK.at[:, 2:].set(False)
    _, after = run(fewer)
    want = 0.5 * np.mean(means[:2], 0)
    np.testing.assert_allclose(
        after["batch_stats"]["BatchNorm_0"]["mean"], want, 1e-5, 1e-6
    )
    _, after = run(MASK & False)
    assert_trees_equal(after["batch_stats"], variables["batch_stats"])


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


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(2)(x)
        self.sow("losses", "square", (y**2).sum(-1))
        calls = self.variable("count", "valid", lambda: jnp.zeros((), jnp.int32))
        calls.value = jnp.int32(x.shape[0])
        return y


@lowerings
def test_what_is_sown_at_masked_steps_is_zero_and_init_needs_no_mask(options):
    model = linen(Sows(), **options)
    variables = model.init(jax.random.key(0), ONES)
    variables = {"params": variables["params"], "count": variables["count"]}
    y, state = model.apply(variables, ONES, mask=MASK, mutable=["losses", "count"])
    (sown,) = state["losses"]["square"]
    np.testing.assert_allclose(sown.sum(), (y**2).sum(), 1e-5)
    _, state = model.apply(variables, ONES, mask=MASK & False, mutable=["count"])
    assert_trees_equal(state["count"], variables["count"])


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


def test_masks_reach_the_transform_and_not_the_layer():
    for call in (
        lambda mask: linen(nn.Dense(2)).init(jax.random.key(0), ONES, mask=mask),
        lambda mask: tdjax.nnx.TimeDistributed(nnx.Linear(F, 2, rngs=nnx.Rngs(0)))(
            ONES, mask=mask
        ),
    ):
        with pytest.raises(
            ValueError, match=r"mask must have shape .* got bool\[3,2\]"
        ):
            call(MASK[:, :2])


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
