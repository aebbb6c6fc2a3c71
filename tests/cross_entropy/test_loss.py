"""The fused loss against Optax on the logits that it never holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import tdjax
from helpers import (
    assert_trees_close,
    integers,
    normal,
    quick_compile,
    slow_but,
    x64,
)

B, T, F, V = 2, 9, 4, 7
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"logits_soft_cap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 0.05, "logits_soft_cap": 2.0},
]
BLOCKS = [(None, None), (4, None), (4, 3), (None, 2), (100, 100), (1, 1)]
blocks = pytest.mark.parametrize(
    ("chunk_size", "vocab_chunk_size"), [(None, None), (4, None), (5, 3)]
)


def by_optax(
    params, hidden, labels, *, mask=None, reduction="mean",
    label_smoothing=0.0, z_loss=0.0, logits_soft_cap=None, ignore_class=None,
):  # fmt: skip
    """All logits at once, by the book."""
    logits = hidden @ params["kernel"] + params.get("bias", 0)
    if logits_soft_cap:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    valid = jnp.ones(labels.shape, bool) if mask is None else mask
    valid &= True if ignore_class is None else labels != ignore_class
    logits = jnp.where(valid[..., None], logits, 0)
    targets = jax.nn.one_hot(jnp.where(valid, labels, 0), logits.shape[-1])
    targets = optax.smooth_labels(targets, label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    losses += z_loss * jax.nn.logsumexp(logits, -1) ** 2
    losses = jnp.where(valid, losses, 0)
    mean = losses.sum() / jnp.maximum(valid.sum(), 1)
    return {"mean": mean, "sum": losses.sum(), "none": losses}[reduction]


def make(batch=B, time=T, features=F, words=V, dtype=jnp.float32):
    params = {
        "kernel": normal(1, features, words, dtype=dtype),
        "bias": normal(2, words, dtype=dtype),
    }
    labels = np.random.default_rng(3).integers(0, words, (batch, time))
    return params, normal(4, batch, time, features, dtype=dtype), jnp.asarray(labels)


def value_and_gradients(loss, params, hidden, labels, **options):
    """By params and hidden; of losses of steps, the gradient of a weighted sum."""
    weights = 1.0
    if options.get("reduction") == "none":
        weights = normal(5, *labels.shape, dtype=hidden.dtype)

    def total(params, hidden):
        return jnp.sum(weights * loss(params, hidden, labels, **options))

    return quick_compile(jax.value_and_grad(total, (0, 1)), params, hidden)


def assert_as_optax(params, hidden, labels, tolerance, *many_sizes, **options):
    """Compares with Optax, for each pair of chunk sizes."""
    want = value_and_gradients(by_optax, params, hidden, labels, **options)
    alone = jax.jit(functools.partial(by_optax, **options))(params, hidden, labels)
    for chunk, words in many_sizes or [(None, None)]:
        ours = functools.partial(
            tdjax.linear_cross_entropy, chunk_size=chunk, vocab_chunk_size=words
        )
        got = value_and_gradients(ours, params, hidden, labels, **options)
        assert_trees_close(got, want, tolerance, tolerance)
        # Without gradients it goes another way.
        got = jax.jit(functools.partial(ours, **options))(params, hidden, labels)
        np.testing.assert_allclose(got, alone, tolerance, tolerance)


# Agreement


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_float64_it_is_optax_to_the_last_digits(options, reduction):
    with x64():
        params, hidden, labels = make(dtype=jnp.float64)
        mask = tdjax.lengths_to_mask(jnp.array([9, 4]), T)
        assert_as_optax(
            params, hidden, labels, 1e-12, *BLOCKS[1:3], mask=mask, reduction=reduction,
            **options,
        )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=8)
@given(
    st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 9),
    st.sampled_from(BLOCKS), st.sampled_from(OPTIONS),
    st.sampled_from(["mean", "sum", "none"]), st.booleans(), st.data(),
)  # fmt: skip
def test_any_shape_mask_and_block(
    batch, time, features, words, sizes, options, reduction, has_bias, data
):
    params, hidden, labels = make(batch, time, features, words)
    if not has_bias:
        del params["bias"]
    bits = data.draw(
        st.lists(st.booleans(), min_size=batch * time, max_size=batch * time)
    )
    mask = jnp.array(bits, bool).reshape(batch, time)
    options = {"mask": mask, "reduction": reduction, **options}
    assert_as_optax(params, hidden, labels, 3e-5, sizes, **options)


@pytest.mark.parametrize("dtype", slow_but((1,), [jnp.bfloat16, jnp.float16]))
@blocks
def test_half_precision_sums_in_float32(dtype, chunk_size, vocab_chunk_size):
    params, hidden, labels = make(4, 64, 16, 100, dtype)
    ours = functools.partial(
        tdjax.linear_cross_entropy,
        chunk_size=chunk_size,
        vocab_chunk_size=vocab_chunk_size,
    )
    loss, gradients = value_and_gradients(ours, params, hidden, labels)
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    want, d_wide = value_and_gradients(by_optax, wide(params), wide(hidden), labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, 1e-5)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(d_wide)):
        assert got.dtype == dtype
        error = np.abs(got.astype(jnp.float32) - want).max() / np.abs(want).max()
        assert error < 4 * jnp.finfo(dtype).eps


def test_mixed_dtypes_are_promoted_as_in_dense():
    params, hidden, labels = make()
    narrow = hidden.astype(jnp.bfloat16)
    wide = narrow.astype(jnp.float32)
    got = value_and_gradients(tdjax.linear_cross_entropy, params, narrow, labels)
    want = value_and_gradients(by_optax, params, wide, labels)
    assert_trees_close(got[1][0], want[1][0])
    assert got[1][1].dtype == jnp.bfloat16
    with x64():
        params["bias"] = params["bias"].astype(jnp.float64)
        got = value_and_gradients(tdjax.linear_cross_entropy, params, hidden, labels)
        assert got[0].dtype == jnp.float32
        assert got[1][0]["bias"].dtype == jnp.float64


@pytest.mark.slow
def test_a_mean_over_many_steps_keeps_small_probabilities_in_float16():
    params, hidden, labels = make(64, 64, 4, 50, jnp.float16)
    gradient = jax.grad(tdjax.linear_cross_entropy)(params, hidden, labels * 0)
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    want = jax.grad(by_optax)(wide(params), wide(hidden), labels * 0)
    np.testing.assert_allclose(gradient["kernel"], want["kernel"], 0.02, 2e-6)


@blocks
def test_extreme_logits(chunk_size, vocab_chunk_size):
    params, hidden, labels = make()
    # Of integers the products are exact; a rounding of 1e4 would be one of e.
    exact = {"kernel": 1e4 * integers(1, F, V)}
    sizes = chunk_size, vocab_chunk_size
    assert_as_optax(exact, integers(2, B, T, F), labels, 3e-4, sizes)
    params = {"kernel": 1e4 * params["kernel"]}
    sure = (hidden @ params["kernel"]).argmax(-1)
    ours = functools.partial(
        tdjax.linear_cross_entropy,
        chunk_size=chunk_size,
        vocab_chunk_size=vocab_chunk_size,
    )
    loss, gradients = value_and_gradients(ours, params, hidden, sure)
    assert loss == 0
    # With words in chunks the logits are made twice, and rounded each time.
    bound = 1e-6 if vocab_chunk_size is None else 1e-2
    assert np.abs(gradients[0]["kernel"]).max() < bound


@pytest.mark.slow
@blocks
def test_one_word_one_step_and_none(chunk_size, vocab_chunk_size):
    sizes = chunk_size, vocab_chunk_size
    params, hidden, labels = make(words=1)
    loss, gradients = value_and_gradients(
        tdjax.linear_cross_entropy, params, hidden, labels
    )
    assert loss == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    for shape in ((1, 1), (0, 5), (3, 0)):
        params, hidden, labels = make(*shape)
        assert_as_optax(params, hidden, labels, 1e-5, sizes)
        losses = tdjax.linear_cross_entropy(params, hidden, labels, reduction="none")
        assert losses.shape == shape


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4)])
def test_any_number_of_leading_axes(shape):
    labels = jnp.asarray(np.random.default_rng(0).integers(0, V, shape))
    assert_as_optax(make()[0], normal(4, *shape, F), labels, 1e-5)


@blocks
def test_words_that_the_bias_bans_have_no_gradient(chunk_size, vocab_chunk_size):
    params, hidden, labels = make()
    params["bias"] = params["bias"].at[jnp.array([0, 1, 2, 6])].set(-jnp.inf)
    labels = jnp.clip(labels, 3, 5)
    ours = functools.partial(
        tdjax.linear_cross_entropy,
        chunk_size=chunk_size,
        vocab_chunk_size=vocab_chunk_size,
    )
    loss, (d_params, _) = value_and_gradients(ours, params, hidden, labels)
    np.testing.assert_allclose(loss, by_optax_on_allowed(params, hidden, labels), 1e-5)
    assert not np.any(d_params["kernel"][:, :3])
    assert np.isfinite(d_params["kernel"]).all()


def by_optax_on_allowed(params, hidden, labels):
    allowed = {name: x[..., 3:6] for name, x in params.items()}
    return by_optax(allowed, hidden, labels - 3)


# What does not count


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_is_in_masked_steps_changes_nothing(reduction):
    params, hidden, labels = make()
    mask = tdjax.lengths_to_mask(jnp.array([0, 4]), T)
    bad = jnp.resize(jnp.array([np.nan, np.inf, -np.inf, 3e38]), hidden.shape)
    spoiled = jnp.where(mask[..., None], hidden, bad)
    wrong_labels = jnp.where(mask, labels, -12345)
    options = {"mask": mask, "reduction": reduction, "chunk_size": 4}
    ours = functools.partial(value_and_gradients, tdjax.linear_cross_entropy)
    got = ours(params, spoiled, wrong_labels, **options)
    assert_trees_close(got, ours(params, hidden, labels, **options), 0, 0)
    assert not np.any(got[1][1][~mask])


def test_ignored_labels_count_as_masked():
    params, hidden, labels = make()
    mask = tdjax.lengths_to_mask(jnp.array([9, 4]), T)
    ignored = labels.at[0, :3].set(-1)
    assert_as_optax(params, hidden, ignored, 1e-5, mask=mask, ignore_class=-1)
    assert_as_optax(params, hidden, labels, 1e-5, ignore_class=2)


def test_nothing_that_counts_gives_zero_and_no_gradient():
    params, hidden, labels = make()
    none = jnp.zeros((B, T), bool)
    for reduction in ("mean", "sum"):
        got = value_and_gradients(
            tdjax.linear_cross_entropy, params, hidden * jnp.nan, labels, mask=none,
            reduction=reduction,
        )  # fmt: skip
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(got))


def test_a_banned_word_does_not_reach_masked_steps():
    params, hidden, labels = make()
    params["bias"] = params["bias"].at[0].set(-jnp.inf)
    mask = tdjax.lengths_to_mask(jnp.array([9, 4]), T)
    got = tdjax.linear_cross_entropy(params, hidden, labels % 6 + 1, mask=mask)
    allowed = {name: x[..., 1:] for name, x in params.items()}
    np.testing.assert_allclose(
        got, by_optax(allowed, hidden, labels % 6, mask=mask), 1e-5
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("sizes", slow_but((1,), [(None, None), (4, 100)]))
def test_labels_of_few_bits_and_many_words(dtype, sizes):
    params, hidden, labels = make(words=259)
    small = (labels % 5).astype(dtype)
    ours = functools.partial(
        tdjax.linear_cross_entropy, chunk_size=sizes[0], vocab_chunk_size=sizes[1]
    )
    got = value_and_gradients(ours, params, hidden, small)
    want = value_and_gradients(by_optax, params, hidden, labels % 5)
    assert_trees_close(got, want)
    assert np.isfinite(ours(params, hidden, small, ignore_class=-1))


def test_parameters_may_be_numpy_arrays():
    params, hidden, labels = make()
    numpy = jax.tree.map(np.asarray, (params, hidden, labels))
    want = by_optax(params, hidden, labels)
    np.testing.assert_allclose(tdjax.linear_cross_entropy(*numpy), want, 1e-5)


def test_a_scaled_loss_saves_small_gradients_in_float16():
    params, hidden, labels = make(1, 256, 4, 8192, jnp.float16)
    scaled = lambda params: (
        2.0**12 * tdjax.linear_cross_entropy(params, hidden, labels % 9)
    )
    gradient = jax.jit(jax.grad(scaled))(params)["kernel"]
    assert np.mean(gradient == 0) < 1e-3


def test_a_label_that_is_no_word_is_nan_inside_jit():
    params, hidden, labels = make()
    for wrong in (V, -1):
        losses = jax.jit(
            functools.partial(
                tdjax.linear_cross_entropy, reduction="none", chunk_size=4
            )
        )(params, hidden, labels.at[1, 2].set(wrong))
        where = np.argwhere(np.isnan(losses))
        np.testing.assert_array_equal(where, [[1, 2]])
        gradient = jax.jit(jax.grad(tdjax.linear_cross_entropy))(
            params, hidden, labels.at[1, 2].set(wrong)
        )
        assert np.isnan(gradient["kernel"]).any()


# Transformations


@pytest.mark.slow
@pytest.mark.parametrize(("chunk_size", "vocab_chunk_size"), BLOCKS[:3:2])
def test_second_derivatives_vmap_and_checkpoint(chunk_size, vocab_chunk_size):
    params, hidden, labels = make(1, 5)
    options = {"chunk_size": chunk_size, "vocab_chunk_size": vocab_chunk_size}
    ours = functools.partial(tdjax.linear_cross_entropy, **options)
    for reduction in ("mean", "none"):

        def square(loss, hidden, reduction=reduction):
            return jnp.sum(loss(params, hidden, labels, reduction=reduction) ** 2)

        hessian = lambda loss: jax.jit(jax.hessian(functools.partial(square, loss)))
        got, want = hessian(ours)(hidden), hessian(by_optax)(hidden)
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)
    loss = lambda fun: lambda params, hidden: fun(params, hidden, labels)
    size = lambda fun: (
        lambda params: sum(
            jnp.sum(leaf**2)
            for leaf in jax.tree.leaves(jax.grad(loss(fun))(params, hidden))
        )
    )
    second = lambda fun: jax.jit(jax.grad(size(fun)))(params)
    assert_trees_close(second(ours), second(by_optax))
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    each = lambda fun: jax.jit(jax.vmap(jax.grad(loss(fun)), (0, None)))(both, hidden)
    assert_trees_close(each(ours), each(by_optax))
    got = jax.grad(jax.checkpoint(loss(ours)))(params, hidden)
    assert_trees_close(got, jax.grad(loss(by_optax))(params, hidden))


def test_second_derivatives_where_the_first_are_zero():
    """A least squares fit at its optimum: the cotangents of the losses are zero."""
    params, hidden, labels = make(1, 3)
    still = jax.lax.stop_gradient

    def squares(loss, hidden):
        losses = loss(params, hidden, labels, reduction="none")
        return jnp.sum((losses - still(losses)) ** 2)

    hessian = lambda loss: jax.jit(jax.hessian(functools.partial(squares, loss)))
    want = hessian(by_optax)(hidden)
    assert np.abs(want).max() > 0.1
    got = hessian(tdjax.linear_cross_entropy)(hidden)
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "differentiate",
    [lambda f, x: jax.jvp(f, (x,), (x,)), lambda f, x: jax.jacfwd(f)(x)],
    ids=["jvp", "jacfwd"],
)
def test_forward_mode_alone_is_refused_in_words(differentiate, reduction):
    params, hidden, labels = make()
    loss = lambda hidden: tdjax.linear_cross_entropy(
        params, hidden, labels, reduction=reduction
    )
    message = "linear_cross_entropy has no forward-mode .* Use jax.grad, jax.vjp"
    with pytest.raises(TypeError, match=message):
        differentiate(loss, hidden)


def test_forward_mode_around_jit_is_refused_by_jax():
    """The docstring says so: inside `jit`, JAX finds it after the loss returned."""
    params, hidden, labels = make()
    loss = jax.jit(lambda hidden: tdjax.linear_cross_entropy(params, hidden, labels))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (hidden,), (hidden,))
    _, derivative = jax.linearize(loss, hidden)
    with pytest.raises(TypeError, match="forward-mode"):
        derivative(hidden)


def test_it_exports_with_symbolic_batch_and_time():
    params, hidden, labels = make()
    sizes = jax.export.symbolic_shape("b, t")
    specs = [
        jax.ShapeDtypeStruct((*sizes, F), "float32"),
        jax.ShapeDtypeStruct(sizes, labels.dtype),
    ]
    fun = jax.jit(functools.partial(tdjax.linear_cross_entropy, params))
    got = jax.export.export(fun)(*specs).call(hidden, labels)
    np.testing.assert_allclose(got, by_optax(params, hidden, labels), 1e-5)


def test_the_logits_are_never_whole():
    steps, words = 4096, 3000
    params, hidden, labels = make(1, steps, 8, words)

    def temporaries(loss):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
            params, hidden, labels
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    plain = temporaries(by_optax)
    assert plain >= 4 * steps * words
    ours = functools.partial(tdjax.linear_cross_entropy, chunk_size=256)
    assert temporaries(ours) < plain / 8
    words_too = functools.partial(ours, vocab_chunk_size=256)
    assert temporaries(words_too) < plain / 50


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": {"bias": jnp.ones(3)}}, ValueError, "params must have the key 'kernel'"),
        ({"params": {"kernel": jnp.ones((4, 0))}}, ValueError, "vocabulary must not be empty"),
        ({"params": {"kernel": jnp.ones((3, 7))}}, ValueError,
         r"hidden must have the features .* got hidden float32\[2,9,4\], kernel float32\[3,7\]"),
        ({"hidden": jnp.ones((2, 9, 4), int)}, TypeError, r"hidden must be of floats, got int32"),
        ({"labels": jnp.ones((2, 9))}, TypeError, r"labels must be integers, got float32\[2,9\]"),
        ({"labels": jnp.ones((2, 9, 7), int)}, ValueError,
         r"labels must have the shape of hidden without its features, got int32\[2,9,7\]"),
        ({"labels": jnp.full((2, 9), 7)}, ValueError,
         r"labels must be from 0 to 6, .* got 7 at \(0, 0\) \(18 of 18 are out of range\)"),
        ({"labels": jnp.full((2, 9), -100)}, ValueError, "got -100 .* give ignore_class"),
        ({"mask": jnp.ones((2, 9))}, TypeError, r"mask must be bool, .* got float32\[2,9\]"),
        ({"mask": jnp.ones((2,), bool)}, ValueError, r"mask .* got bool\[2\] for labels int32\[2,9\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"label_smoothing": "a"}, TypeError, r"label_smoothing must be a number or a scalar array, got str"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be 0 or positive, got -1.0"),
        ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be positive, got 0.0"),
        ({"ignore_class": 1.0}, TypeError, r"ignore_class must be an int, got float"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive int, got 0"),
        ({"chunk_size": "all"}, ValueError, "chunk_size must be an int or 'auto', got 'all'"),
        ({"chunk_size": 4, "max_logits_bytes": 100}, ValueError, "Give one or the other"),
        ({"weights": jnp.ones((2, 9), bool)}, TypeError, r"weights must be of floats, .*Pass it as mask"),
        ({"weights": jnp.ones(7)}, ValueError, r"weights must have the shape of labels, .*pass class_weights"),
        ({"class_weights": jnp.ones(7, int)}, TypeError, "class_weights must be of floats"),
        ({"class_weights": jnp.ones((2, 9))}, ValueError,
         r"class_weights must have shape \(words,\) = \(7,\), got float32\[2,9\]"),
        ({"label_smoothing": jnp.ones(2)}, TypeError, "label_smoothing must be a number or a scalar"),
        ({"z_loss": jnp.asarray(-1.0)}, ValueError, "z_loss must be 0 or positive, got -1.0"),
        ({"capacity": 3}, ValueError, "capacity=3 needs something that says which steps"),
        ({"capacity": 3, "mask": jnp.ones((2, 9), bool)}, ValueError, "capacity=3 must be .* got 18"),
        ({"vocab_chunk_size": 2.0}, TypeError, "vocab_chunk_size must be a positive int"),
    ],
)  # fmt: skip
def test_errors(user_errors, changes, error, message):
    params, hidden, labels = make()
    arguments = {"params": params, "hidden": hidden, "labels": labels, **changes}
    with pytest.raises(error, match=message):
        tdjax.linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": jnp.ones((2, 9, 7))}, TypeError, r"got float32\[2,9,7\].*labels.argmax\(-1\)"),
        ({"labels": jnp.ones((2, 9, 7), int)}, ValueError, r"int32\[2,9,7\].*labels.argmax\(-1\)"),
        ({"labels": jnp.ones((2, 9, 7), bool)}, TypeError, r"bool\[2,9,7\].*labels.argmax\(-1\)"),
        ({"params": {"embedding": jnp.ones((4, 7))}}, ValueError,
         r"got hidden float32\[2,9,4\], embedding float32\[4,7\].*name it 'kernel'; if hidden are the logits"),
        ({"params": {"embedding": jnp.ones((7, 4)), "kernel": jnp.ones((4, 7))}}, ValueError,
         r"must have the key 'kernel', .* or 'embedding', .* got \['embedding', 'kernel'\]. Give one"),
        ({"params": {"weight": jnp.ones((7, 4))}}, ValueError, "weight, .* is the 'embedding' here"),
        ({"params": {"a": {"kernel": jnp.ones((4, 7))}}}, ValueError, r"own part, of params\['a'\]\."),
        ({"params": {"kernel": jnp.ones((4, 7)), "b": 1}}, ValueError, r"got \['b', 'kernel'\]\.$"),
        ({"labels": jnp.ones((9, 2), int)}, ValueError, "pass labels.T"),
        ({"labels": jnp.ones((2, 9, 1), int)}, ValueError, r"Pass labels\[\.\.\., 0\]"),
        ({"labels": [[1] * 9] * 2}, TypeError, r"Pass jnp.asarray\(labels\)"),
        ({"weights": jnp.ones((2, 1))}, ValueError, r"broadcast_to\(weights, labels.shape\)"),
        ({"weights": jnp.ones(2)}, ValueError, r"broadcast_to\(weights\[\.\.\., None\], labels.shape\)"),
        ({"mask": jnp.ones((2, 9), bool), "capacity": jnp.array(3)}, TypeError, "name it in static_argnames"),
        ({"params": {"params": {"kernel": jnp.ones((4, 7))}}}, ValueError,
         r"got \['params'\]. Pass the head's own part, of params\['params'\]\."),
        ({"params": {"params": {"Dense_0": {"kernel": jnp.ones((4, 7))}}}}, ValueError,
         r"head's own part, of params\['params'\]\['Dense_0'\]\."),
        ({"params": {"kernel": jnp.ones((7, 4)), "bias": jnp.ones(7)}}, ValueError,
         r"got hidden float32\[2,9,4\], kernel float32\[7,4\].*name it 'embedding'"),
        ({"params": nn.Dense(7)}, TypeError,
         r"got a Linen module, Dense. Pass variables\['params'\]"),
        ({"hidden": jnp.ones((2, 9), int), "labels": jnp.ones((2, 9, 4))}, TypeError,
         r"hidden must be of floats, got int32\[2,9\]. Are hidden and labels swapped?"),
        ({"hidden": jnp.ones((2, 4), int), "labels": jnp.ones((2, 9, 4))}, TypeError, "swapped"),
        ({"mask": jnp.ones((2, 9), int)}, TypeError, r"mask must be bool, .* got int32\[2,9\]"),
        ({"mask": jnp.array([9, 4])}, TypeError, r"got int32\[2\].*lengths_to_mask"),
        ({"mask": jnp.ones((9, 2), bool)}, ValueError, r"got bool\[9,2\] .* pass mask.T"),
        ({"mask": jnp.ones((2, 9, 1), bool)}, ValueError, r"got bool\[2,9,1\] for labels int32\[2,9\]"),
    ],
)  # fmt: skip
def test_errors_say_what_to_pass_instead(user_errors, changes, error, message):
    params, hidden, labels = make()
    arguments = {"params": params, "hidden": hidden, "labels": labels, **changes}
    with pytest.raises(error, match=message):
        tdjax.linear_cross_entropy(**arguments)


def test_labels_beyond_32_bits_are_out_of_range_and_not_wrapped(user_errors):
    params, hidden, _ = make(1, 2)
    for wrong in (2**32, 2**32 + 1, -(2**32)):
        labels = np.array([[1, wrong]], np.int64)
        loss = functools.partial(tdjax.linear_cross_entropy, params, hidden, labels)
        with pytest.raises(ValueError, match=f"got {wrong} at \\(0, 1\\)"):
            loss()
        want = tdjax.linear_cross_entropy(params, hidden[:, :1], labels[:, :1])
        np.testing.assert_allclose(loss(ignore_class=wrong), want, 1e-6)
        masked = lambda mask, loss=loss: loss(mask=mask)
        np.testing.assert_allclose(
            jax.jit(masked)(jnp.array([[True, False]])), want, 1e-6
        )
        assert np.isnan(jax.jit(masked)(jnp.array([[True, True]])))


@pytest.mark.parametrize("ignored", [2**31, -(2**31) - 1, 2**40, 300])
def test_an_ignored_class_that_labels_cannot_hold_ignores_none(ignored):
    params, hidden, labels = make()
    want = tdjax.linear_cross_entropy(params, hidden, labels)
    for dtype in ("int32", "uint8"):
        loss = tdjax.linear_cross_entropy(
            params, hidden, labels.astype(dtype), ignore_class=ignored
        )
        np.testing.assert_allclose(loss, want, 1e-6)


def test_a_soft_cap_and_chunks_of_words_have_second_derivatives_in_reverse(key):
    """A label outside a chunk of words must not make the derivative of `tanh` NaN."""
    head = tdjax.init_dense(key, 4, 13)
    hidden = jax.random.normal(key, (3, 5, 4))
    labels = jax.random.randint(key, (3, 5), 0, 13)

    def twice(loss):
        def value(head):
            loss_value, gradient = jax.value_and_grad(loss)(head)
            return loss_value + sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient))

        return jax.jit(jax.grad(value))(head)

    def plain(head):
        logits = 2 * jnp.tanh(tdjax.dense(head, hidden) / 2)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    fused = lambda head: tdjax.linear_cross_entropy(
        head, hidden, labels, logits_soft_cap=2.0, chunk_size=4, vocab_chunk_size=5
    )
    for got, want in zip(*map(jax.tree.leaves, (twice(fused), twice(plain)))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
