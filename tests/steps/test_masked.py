"""Masks: what is in a masked step changes nothing, anywhere, packed or not."""

import functools

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
from helpers import (
    BAD,
    assert_trees_close,
    assert_trees_equal,
    normal,
    slow_but,
    spoil,
)

B, T, F = 3, 4, 5
MASK = tdjax.lengths_to_mask(jnp.array([4, 2, 0]), T)
VALID = 6
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
lowerings = pytest.mark.parametrize(
    "options", slow_but((1, 2, 5, 7), LOWERINGS), ids=str
)


def unit(kernel, x):
    """A projection of length 1: its gradient is NaN where the projection is zero."""
    y = x @ kernel
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


def loop_over_valid_steps(kernel, x, mask, weights):
    """Values and gradients of `unit` in float64 NumPy, one valid step at a time."""
    kernel, x, weights = (np.asarray(a, np.float64) for a in (kernel, x, weights))
    y = np.zeros(weights.shape)
    d_kernel, d_x = np.zeros_like(kernel), np.zeros_like(x)
    for place in np.argwhere(mask):
        b, t = place
        z = x[b, t] @ kernel
        length = np.sqrt(z @ z)
        y[b, t] = z / length
        d_z = (weights[b, t] - (weights[b, t] @ y[b, t]) * y[b, t]) / length
        d_kernel += np.outer(x[b, t], d_z)
        d_x[b, t] = kernel @ d_z
    return y, (d_kernel, d_x)


def value_and_gradients(options, kernel, x, mask, weights):
    apply = tdjax.time_distributed(unit, in_axes=(None, 1), **options)
    y, pullback = jax.vjp(lambda k, x: apply(k, x, mask=mask), kernel, x)
    return y, pullback(weights)


@lowerings
def test_what_is_in_masked_steps_changes_no_value_and_no_gradient(options):
    kernel, weights = normal(1, F, 2), normal(2, B, T, 2)
    x = spoil(normal(0, B, T, F), MASK)
    want = loop_over_valid_steps(kernel, x, MASK, weights)
    # Cotangents of masked results may be NaN as well.
    cotangents = spoil(weights, MASK)
    run = functools.partial(value_and_gradients, options)
    known = lambda kernel, x, cotangents: run(kernel, x, np.asarray(MASK), cotangents)
    for got in (
        jax.jit(run)(kernel, x, MASK, cotangents),
        jax.jit(known)(kernel, x, cotangents),
    ):
        assert_trees_close(got, want)
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
@pytest.mark.parametrize("timesteps", [T, B])
def test_time_major_data_have_a_time_major_mask(options, timesteps):
    kernel, weights = normal(1, F, 2), normal(2, B, timesteps, 2)
    mask = MASK[:, :timesteps]
    x = spoil(normal(0, B, timesteps, F), mask)
    want = loop_over_valid_steps(kernel, x, mask, weights)
    apply = tdjax.time_distributed(unit, in_axes=(None, 0), out_axes=0, **options)
    turn = lambda a: jnp.swapaxes(a, 0, 1)

    def run(kernel, x, weights, mask):
        y, pullback = jax.vjp(lambda k, x: apply(k, x, mask=mask), kernel, turn(x))
        d_kernel, d_x = pullback(turn(weights))
        return turn(y), (d_kernel, turn(d_x))

    known = functools.partial(run, mask=np.asarray(mask).T)
    assert_trees_close(jax.jit(known)(kernel, x, weights), want)
    assert_trees_close(jax.jit(run)(kernel, x, weights, mask.T), want)


@lowerings
def test_layers_and_keys_of_time_major_data_have_a_time_major_mask(options):
    x = spoil(normal(0, B, B, F), MASK[:, :B])
    turn = lambda a: jnp.swapaxes(a, 0, 1)
    layer, mask = nn.Dense(2), np.asarray(MASK[:, :B])
    variables = layer.init(jax.random.key(0), x[:, 0])
    want = jnp.where(mask[..., None], layer.apply(variables, x), 0)
    model = tdjax.linen.TimeDistributed(layer, in_axes=0, out_axes=0, **options)
    got = jax.jit(lambda v, x: model.apply(v, x, mask=mask.T))(variables, turn(x))
    assert_trees_close(turn(got), want)
    layer = nnx.Linear(F, 2, rngs=nnx.Rngs(0))
    want = jnp.where(mask[..., None], layer(x), 0)
    model = tdjax.nnx.TimeDistributed(layer, in_axes=0, out_axes=0, **options)
    got = nnx.jit(lambda model, x: model(x, mask=mask.T))(model, turn(x))
    assert_trees_close(turn(got), want)


def test_one_batch_major_input_makes_the_mask_batch_major():
    x, times = normal(0, B, B, F), jnp.arange(B)
    apply = tdjax.time_distributed(lambda x, t: x + t, in_axes=(1, 0))
    mask = MASK[:, :B]
    want = jnp.where(mask[..., None], x + times[:, None], 0)
    assert_trees_close(apply(x, times, mask=mask), want)


@lowerings
def test_any_pytree_of_results_time_axes_and_kinds(options):
    def fun(inputs, shared):
        x, ids = inputs["x"], inputs["ids"]
        return {"sum": x.sum(-1) + shared, "ids": ids + 1, "even": ids % 2 == 0}

    x, ids = normal(0, T, B, F), jnp.arange(B * T).reshape(B, T).astype(jnp.uint8)
    axes = {"x": 0, "ids": 1}
    outs = {"sum": 0, "ids": -1, "even": 1}
    apply = tdjax.time_distributed(fun, in_axes=(axes, None), out_axes=outs, **options)
    run = jax.jit(lambda inputs: apply(inputs, 2.0, mask=MASK))
    got = run({"x": x, "ids": ids})
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
    gradient = jax.jit(jax.grad(loss))(table)
    np.testing.assert_allclose(
        gradient, np.eye(7)[3][:, None] * VALID * np.ones((1, 2))
    )


@lowerings
def test_the_mask_can_be_an_input_too_one_slice_a_step(options):
    count = lambda x, present: jnp.where(present, 1, 100) * jnp.ones_like(x)
    apply = tdjax.time_distributed(count, **options)
    x = jnp.ones((B, T))
    odd = MASK.at[0, 0].set(False)
    got = jax.jit(apply)(x, odd, mask=MASK)
    np.testing.assert_array_equal(got, jnp.where(MASK, jnp.where(odd, 1, 100), 0))


@lowerings
def test_inputs_without_a_batch_are_those_of_the_step(options):
    if options.get("method") == "fold":
        pytest.skip("fold wants a batch in every input")
    add = lambda x, place: x + place
    apply = tdjax.time_distributed(add, in_axes=(1, 0), **options)
    got = jax.jit(apply)(jnp.zeros((B, T, F)), jnp.arange(T), mask=MASK)
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
    got = jax.jit(jax.grad(lambda w: apply(w, x, words, mask=MASK).sum()))(1.0)
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


ONES = jnp.ones((B, T, F))


def td(fun, **options):
    return tdjax.time_distributed(fun, **options)


def linen(layer, **options):
    return tdjax.linen.TimeDistributed(layer, **options)


@lowerings
def test_linen_and_nnx_hide_masked_steps_as_the_transform_does(options):
    x, bad = normal(0, B, T, F), spoil(normal(0, B, T, F), MASK, jnp.nan)
    model = linen(nn.Dense(2), **options)
    variables = model.init(jax.random.key(0), bad, mask=MASK)
    ours = lambda v: model.apply(v, bad, mask=MASK)
    plain = lambda v: tdjax.dense(v["params"], x) * MASK[..., None]
    got, want = (
        jax.jit(jax.value_and_grad(squares(f), has_aux=True))(variables)
        for f in (ours, plain)
    )
    assert_trees_close(got, want, 1e-4, 1e-5)

    layer = nnx.Linear(F, 2, rngs=nnx.Rngs(0))
    wrapped = tdjax.nnx.TimeDistributed(layer, **options)
    derive = lambda loss: nnx.jit(nnx.grad(squares(loss), has_aux=True))
    gradients, y = derive(lambda m: m(bad, mask=MASK))(wrapped)
    plain, want = derive(lambda m: m(x) * MASK[..., None])(layer)
    assert_trees_close(y, want)
    assert_trees_close(
        jax.tree.leaves(nnx.to_pure_dict(gradients)["layer"]),
        jax.tree.leaves(nnx.to_pure_dict(plain)), 1e-4, 1e-5,
    )  # fmt: skip


def squares(fun):
    """`(sum of squares, values)` of `fun`."""

    def loss(x):
        y = fun(x)
        return jnp.sum(y**2), y

    return loss


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


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(2)(x)
        self.sow("losses", "square", (y**2).sum(-1))
        self.sow("losses", "squares", y**2)
        calls = self.variable("count", "valid", lambda: jnp.zeros((), jnp.int32))
        calls.value = jnp.int32(x.shape[0])
        return y


@lowerings
def test_what_is_sown_at_masked_steps_is_zero_and_init_needs_no_mask(options):
    model = linen(Sows(), **options)
    variables = model.init(jax.random.key(0), ONES)
    variables = {"params": variables["params"], "count": variables["count"]}
    y, state = model.apply(variables, ONES, mask=MASK, mutable=["losses", "count"])
    for (sown,) in state["losses"].values():
        np.testing.assert_allclose(sown.sum(), (y**2).sum(), 1e-5)
    _, state = model.apply(variables, ONES, mask=MASK & False, mutable=["count"])
    assert_trees_equal(state["count"], variables["count"])


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: td(abs)(ONES, mask=MASK * 1.0), TypeError,
         r"mask must be bool, True at the valid steps, got float32\[3,4\].*lengths_to_mask"),
        (lambda: td(abs)(ONES, mask=MASK.astype(int)), TypeError,
         r"must be bool, .* got int32\[3,4\]\. Write mask\.astype\(bool\) if it holds 0 and 1"),
        (lambda: td(abs)(ONES, mask=jnp.array([4, 2, 0])), TypeError,
         r"got int32\[3\]\. .* tdjax\.lengths_to_mask\(lengths, timesteps\) if it holds lengths"),
        (lambda: td(abs)(ONES, mask=[1]), TypeError, r"mask must be an array .* got list"),
        (lambda: td(abs)(ONES, mask=MASK[0]), ValueError,
         r"mask must have shape \(batch, time\), got bool\[4\]"),
        (lambda: td(abs)(ONES, mask=MASK[:, :2]), ValueError,
         r"mask must have shape \(batch, time\) = \(3, 4\) to go with an input "
         r"float32\[3,4,5\] with time on axis 1, got bool\[3,2\]"),
        (lambda: td(abs)(ONES, mask=MASK[:2]), ValueError, r"\(3, 4\) .* got bool\[2,4\]"),
        (lambda: td(abs, in_axes=0)(ONES, mask=MASK.T), ValueError,
         r"mask must have shape \(time, batch\) = \(3, 4\) .* time on axis 0, got bool\[4,3\]"),
        (lambda: td(abs, in_axes=0)(ONES, mask=MASK[0]), ValueError,
         r"mask must have shape \(time, batch\), got bool\[4\]"),
        (lambda: td(abs, in_axes=0, capacity=3)(ONES), ValueError,
         r"capacity=3 needs a mask .*: call with mask=, bool, \(time, batch\)"),
        (lambda: td(jnp.mean, out_axes=0)(ONES, mask=MASK), ValueError,
         r"mask needs results with the batch on axis 0 .* got float32\[\]"),
    ],
)  # fmt: skip
def test_errors_of_masks(user_errors, call, error, message):
    with pytest.raises(error, match=message):
        call()
