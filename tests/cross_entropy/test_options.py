"""All options of the softmax head, alone and crossed, in float64, by the book."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tdjax
from helpers import assert_trees_close, quick_compile, x64
from softmax_by_the_book import cross_entropy, log_probs_and_entropies, valid_steps

B, T, F, V = 2, 7, 4, 12
TIGHT = 1e-12


def make(layout="kernel", bias=True, words=V, dtype=np.float64):
    rng = np.random.default_rng(0)
    shape = {"kernel": (F, words), "embedding": (words, F)}[layout]
    params = {layout: rng.normal(size=shape).astype(dtype)}
    if bias:
        params["bias"] = rng.normal(size=words).astype(dtype)
    hidden = rng.normal(size=(B, T, F)).astype(dtype)
    return params, hidden, rng.integers(0, words, (B, T))


def some_weights(seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.5, 2, (B, T)) * rng.integers(0, 2, (B, T))


def some_mask(seed=2):
    return np.random.default_rng(seed).integers(0, 3, (B, T)) > 0


ALONE = {
    "nothing": {},
    "mask": {"mask": some_mask()},
    "weights": {"weights": some_weights()},
    "class_weights": {"class_weights": np.arange(V) % 4 / 2},
    "label_smoothing": {"label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.1},
    "logits_soft_cap": {"logits_soft_cap": 2.0},
    "ignore_class": {"ignore_class": 3},
    "all": {
        "mask": some_mask(), "weights": some_weights(), "ignore_class": 3,
        "class_weights": np.arange(V) % 4 / 2, "label_smoothing": 0.3, "z_loss": 0.1,
        "logits_soft_cap": 2.0,
    },
}  # fmt: skip
BLOCKS = [
    {}, {"chunk_size": 3}, {"chunk_size": 5, "vocab_chunk_size": 5},
    {"vocab_chunk_size": 1}, {"max_logits_bytes": 100},
]  # fmt: skip


def differentiated(loss, params, hidden, labels, arrays, static):
    """Values and gradients by params, hidden, and the float arrays."""
    floats = {n: x for n, x in arrays.items() if n != "mask"}
    rest = {n: x for n, x in arrays.items() if n not in floats}
    cotangents = np.random.default_rng(9).normal(size=labels.shape)

    def total(params, hidden, floats):
        value = loss(params, hidden, labels, **floats, **rest, **static)
        return jnp.sum(jnp.where(value.ndim, cotangents, 1.0) * value)

    value = lambda params, hidden, floats: loss(
        params, hidden, labels, **floats, **rest, **static
    )
    both = lambda *args: (value(*args), jax.grad(total, (0, 1, 2))(*args))
    return quick_compile(both, params, hidden, floats)


def assert_by_the_book(layout, bias, options, reduction, blocks, traced):
    params, hidden, labels = make(layout, bias)
    options = dict(options, reduction=reduction)
    is_array = lambda name, x: (
        isinstance(x, np.ndarray) or (traced and name in ("label_smoothing", "z_loss"))
    )
    arrays = {n: jnp.asarray(x) for n, x in options.items() if is_array(n, x)}
    static = {n: x for n, x in options.items() if n not in arrays}
    book = lambda *args, **options: cross_entropy(*args, **options)[0]
    with x64():
        arrays = {n: jnp.asarray(options[n]) for n in arrays}
        want = differentiated(book, params, hidden, labels, arrays, static)
        got = differentiated(
            tdjax.linear_cross_entropy, params, hidden, labels, arrays,
            {**static, **blocks},
        )  # fmt: skip
        # Class weights are constants, as in PyTorch.
        for _, gradients in (got, want):
            of_classes = gradients[2].pop("class_weights", None)
        assert_trees_close(got, want, TIGHT, TIGHT)
        of_classes = jax.grad(
            lambda w: tdjax.linear_cross_entropy(
                params, hidden, labels, class_weights=w
            )
        )(jnp.ones(V))
        assert not np.any(of_classes)


REDUCTIONS, LAYOUTS = ["mean", "sum", "none"], ["kernel", "embedding"]
CASES = [*itertools.product(ALONE, REDUCTIONS, LAYOUTS)]


def some_quick(cases, step, count):
    """The cases as parameters; every `step`-th is quick, `count` of them, others slow."""
    quick = [(step * i) % len(cases) for i in range(count)]
    return [
        case if i in quick else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "reduction", "layout"), some_quick(CASES, 7, 5))
def test_each_option_alone_and_all_together(name, reduction, layout):
    blocks = BLOCKS[(len(name) + len(reduction)) % len(BLOCKS)]
    assert_by_the_book(layout, True, ALONE[name], reduction, blocks, True)


@pytest.fixture
def as_elsewhere(monkeypatch):
    """Runs on the CPU what is compiled for accelerators."""
    elsewhere = lambda *args, default, **platforms: default(*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)


@pytest.mark.parametrize(
    ("name", "layout", "reduction"),
    some_quick(
        [*itertools.product(["nothing", "all"], LAYOUTS, ["mean", "none"])], 3, 3
    ),
)
def test_what_accelerators_run(name, layout, reduction, as_elsewhere):
    blocks = BLOCKS[2] if reduction == "none" else BLOCKS[1]
    assert_by_the_book(layout, True, ALONE[name], reduction, blocks, True)


options = st.fixed_dictionaries(
    {},
    optional={
        "mask": st.integers(0, 9).map(some_mask),
        "weights": st.integers(0, 9).map(some_weights),
        "class_weights": st.just(np.arange(V) % 4 / 2),
        "label_smoothing": st.sampled_from([0.0, 0.2, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.1]),
        "logits_soft_cap": st.just(2.0),
        "ignore_class": st.just(3),
    },
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["kernel", "embedding"]), st.booleans(), options,
    st.sampled_from(["mean", "sum", "none"]), st.sampled_from(BLOCKS), st.booleans(),
)  # fmt: skip
def test_all_options_crossed(layout, bias, options, reduction, blocks, traced):
    assert_by_the_book(layout, bias, options, reduction, blocks, traced)


# What else it knows


@pytest.mark.parametrize(
    ("name", "reduction", "blocks"),
    some_quick(
        [*itertools.product(["nothing", "mask", "all"], ["mean", "none"], BLOCKS)], 7, 5
    ),
)
def test_aux(name, reduction, blocks):
    params, hidden, labels = make()
    given = {**ALONE[name], "reduction": reduction}
    loss = functools.partial(
        tdjax.linear_cross_entropy, hidden=hidden, labels=labels, has_aux=True, **given,
        **blocks,
    )  # fmt: skip
    book = functools.partial(cross_entropy, hidden=hidden, labels=labels, **given)

    def with_gradient(loss):
        def total(params):
            value, aux = loss(params)
            return jnp.sum(value), (value, tuple(aux))

        return jax.value_and_grad(total, has_aux=True)

    of_aux = jax.grad(lambda params: sum(jnp.sum(x) for x in loss(params)[1]))
    both = lambda params: (loss(params), with_gradient(loss)(params), of_aux(params))
    with x64():
        want = quick_compile(with_gradient(book), params)
        alone, got, nothing = quick_compile(both, params)
        assert_trees_close(got, want, TIGHT, TIGHT)
        assert_trees_close((alone[0], tuple(alone[1])), want[0][1], TIGHT, TIGHT)
    assert alone[1].predictions.dtype == jnp.int32
    assert alone[1].correct.dtype == bool
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("words", [1, 12, 97])
@pytest.mark.parametrize("blocks", [{}, {"vocab_chunk_size": 5}], ids=str)
def test_equally_likely_words_predict_the_first(words, blocks):
    params, hidden, labels = make(words=words, bias=False)
    params = {"kernel": np.round(params["kernel"])}
    hidden = np.round(hidden)
    loss = functools.partial(tdjax.linear_cross_entropy, has_aux=True, **blocks)
    _, aux = jax.jit(loss)(params, hidden, labels)
    want = (hidden @ params["kernel"]).argmax(-1)
    np.testing.assert_array_equal(aux.predictions, want)
    np.testing.assert_array_equal(aux.correct, want == labels)


# Weights


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nan_is_hidden_where_the_weight_is_zero(reduction):
    params, hidden, labels = make(dtype=np.float32)
    weights = some_weights().astype(np.float32)
    bad = np.where((weights == 0)[..., None], np.nan, hidden)
    wrong = np.where(weights == 0, -5, labels)

    def run(hidden, labels):
        loss = lambda params, hidden, weights: jnp.sum(
            tdjax.linear_cross_entropy(
                params, hidden, labels, weights=weights, reduction=reduction
            )
        )
        return quick_compile(
            jax.value_and_grad(loss, (0, 1, 2)), params, hidden, weights
        )

    assert_trees_close(run(bad, wrong), run(hidden, labels), 0, 0)


def test_weights_of_zero_and_one_are_a_mask():
    params, hidden, labels = make(dtype=np.float32)
    mask = some_mask()
    loss = functools.partial(tdjax.linear_cross_entropy, params, hidden, labels)
    assert loss(weights=mask.astype(np.float32)) == loss(mask=mask)


def test_a_padded_vocabulary_is_smoothed_over_the_words_of_weight_one():
    """Words that the bias bans have class weight 0, and no share of the smoothing."""
    params, hidden, labels = make()
    banned = np.arange(V) >= 9
    params["bias"] = np.where(banned, -np.inf, params["bias"])
    given = {"class_weights": 1.0 - banned, "label_smoothing": 0.3}
    with x64():
        loss = jax.value_and_grad(
            functools.partial(tdjax.linear_cross_entropy, labels=labels % 9, **given)
        )
        value, gradient = jax.jit(loss)(params, hidden)
        few = {name: x[..., :9] for name, x in params.items()}
        log_probs = jax.nn.log_softmax(hidden @ few["kernel"] + few["bias"])
        plain = -np.take_along_axis(log_probs, labels[..., None] % 9, -1).mean()
        want = 0.7 * plain - 0.3 * log_probs.sum(-1).mean() / V
        np.testing.assert_allclose(value, want, TIGHT)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        assert not np.any(gradient["kernel"][:, 9:])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_schedule_of_smoothing_may_be_at_zero_with_banned_words(reduction):
    params, hidden, labels = make(dtype=np.float32)
    params["bias"][9:] = -np.inf
    loss = functools.partial(
        tdjax.linear_cross_entropy,
        hidden=hidden,
        labels=labels % 9,
        reduction=reduction,
    )
    total = lambda params, share: jnp.sum(loss(params, label_smoothing=share))
    got = jax.jit(jax.value_and_grad(total))(params, 0.0)
    want = jax.value_and_grad(functools.partial(total, share=0.0))(params)
    assert_trees_close(got, want, 1e-5, 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_outside_the_vocabulary_is_nan_with_class_weights(reduction):
    params, hidden, labels = make(dtype=np.float32)
    labels[1, 2] = V
    weights = np.ones(V, np.float32)
    loss = functools.partial(
        tdjax.linear_cross_entropy, class_weights=weights, reduction=reduction
    )
    got = jax.jit(loss)(params, hidden, labels)
    where = np.arange(B * T).reshape(B, T) == T + 2
    np.testing.assert_array_equal(np.isnan(got), where if got.ndim else True)


def test_masked_labels_that_are_banned_leave_the_weights_gradient():
    params, hidden, labels = make()
    params["bias"][0] = -np.inf
    mask, labels = some_mask(), np.maximum(labels, 1)
    with x64():
        grad = lambda loss: jax.jit(
            jax.grad(lambda w: loss(params, hidden, labels, mask=mask, weights=w))
        )(np.ones((B, T)))
        book = lambda *args, **options: cross_entropy(*args, **options)[0]
        got = grad(tdjax.linear_cross_entropy)
        few = {name: x[..., 1:] for name, x in params.items()}
        want = jax.grad(lambda w: book(few, hidden, labels - 1, mask=mask, weights=w))(
            np.ones((B, T))
        )
        np.testing.assert_allclose(got, want, TIGHT, TIGHT)


@pytest.mark.parametrize("blocks", [{}, {"vocab_chunk_size": 5}], ids=str)
def test_smoothing_keeps_its_digits_at_large_logits(blocks):
    params, hidden, labels = make(dtype=np.float32)
    loss = functools.partial(
        tdjax.linear_cross_entropy, hidden=hidden, labels=labels, label_smoothing=0.5,
        **blocks,
    )  # fmt: skip
    far = {**params, "bias": np.full(V, 1e5, np.float32)}
    near = {**params, "bias": np.zeros(V, np.float32)}
    # The logits themselves are rounded to 1e5 times 6e-8.
    np.testing.assert_allclose(loss(far), loss(near), atol=5e-3)


@pytest.mark.parametrize("scale", [pytest.param(1e-6, marks=pytest.mark.slow), 1e5])
def test_class_weights_do_not_leave_the_range_of_float16(scale):
    params, hidden, labels = make(dtype=np.float16)
    grad = lambda weights: jax.grad(
        lambda params: tdjax.linear_cross_entropy(
            params, hidden, labels, class_weights=weights, label_smoothing=0.1
        )
    )(params)["kernel"].astype(np.float32)
    got, want = grad(jnp.full(V, scale)), grad(jnp.ones(V))
    np.testing.assert_allclose(got, want, 2e-3, 2e-4)


def in_float16_and_32(gradient, *args):
    """Gradients by float16 arrays, and by the same in float32."""
    wide = jax.tree.map(lambda x: x.astype(np.float32), args)
    as_wide = lambda tree: jax.tree.map(lambda x: x.astype(np.float32), tree)
    return as_wide(quick_compile(gradient, *args)), quick_compile(gradient, *wide)


@pytest.mark.parametrize(
    "blocks", [{}, {"chunk_size": 5, "vocab_chunk_size": 5}], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_heavy_word_leaves_the_other_gradients_in_float16(layout, blocks):
    params, hidden, labels = make(layout, dtype=np.float16)
    weights = np.where(np.arange(V) == V - 1, 1e8, 1).astype(np.float32)
    loss = lambda params, hidden: (
        1e3
        * tdjax.linear_cross_entropy(
            params, hidden, labels % (V - 1), class_weights=weights, **blocks
        )
    )
    got, want = in_float16_and_32(jax.grad(loss, (0, 1)), params, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, 2e-2, 2e-3 * np.abs(b).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_light_steps_beside_a_heavy_one_keep_their_gradient_in_float16(layout):
    params, hidden, labels = make(layout, dtype=np.float16)
    weights = np.where(np.arange(B * T) == 3, 1e7, 1).reshape(B, T)
    weights = jnp.asarray(weights, jnp.float32)
    loss = lambda hidden, params: tdjax.linear_cross_entropy(
        params, hidden, labels, weights=weights, reduction="sum"
    )
    got, want = in_float16_and_32(jax.grad(loss), hidden, params)
    light = np.asarray(weights == 1)
    scale = np.abs(want[light]).max()
    np.testing.assert_allclose(got[light], want[light], 5e-3, 2e-3 * scale)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("blocks", [{}, {"vocab_chunk_size": 3}], ids=str)
def test_rows_that_fill_a_chunk_have_no_gradient(blocks, dtype):
    """Their hidden states are zeros, and their logits the bias."""
    params, hidden, labels = make(dtype=dtype)
    hidden, labels = hidden.reshape(-1, F)[:5], labels.reshape(-1)[:5]
    params["bias"] = np.where(np.arange(V) == 3, 100, 0).astype(dtype)

    def gradient(**blocks):
        log_probs = lambda params: tdjax.linear_log_probs(
            params, hidden, labels, temperature=0.5, **blocks
        ).log_probs.sum()
        return quick_compile(jax.grad(log_probs), params)

    got, want = gradient(chunk_size=2, **blocks), gradient()
    assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(got))
    assert_trees_close(got, want, 1e-2, 1e-2)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_chunks_of_masked_steps_alone_in_half_precision(dtype):
    params, hidden, labels = make(dtype=dtype)
    loss = lambda chunk_size: (
        lambda params, hidden: tdjax.linear_cross_entropy(
            params, hidden, labels, mask=some_mask(), chunk_size=chunk_size
        )
    )
    got, want = (
        quick_compile(jax.grad(loss(n), (0, 1)), params, hidden) for n in (1, B * T)
    )
    assert_trees_close(got, want, 1e-2, 1e-3)


def test_masked_steps_leave_the_digits_of_the_others_in_float16():
    """A mean over many steps, of small hidden states: tiny products."""
    rng = np.random.default_rng(0)
    steps = 2**16
    params = {"kernel": rng.normal(size=(F, 8)).astype(np.float16)}
    hidden = (0.005 * rng.normal(size=(steps, F))).astype(np.float16)
    labels, mask = rng.integers(0, 8, steps), rng.uniform(size=steps) < 0.9
    loss = lambda params, hidden: (
        2.0**15 * tdjax.linear_cross_entropy(params, hidden, labels, mask=mask)
    )
    got, want = in_float16_and_32(jax.grad(loss), params, hidden)
    largest = np.abs(want["kernel"]).max()
    np.testing.assert_allclose(got["kernel"], want["kernel"], 0, 2e-3 * largest)


def test_many_words_of_small_probability_keep_their_digits_in_float16():
    rng = np.random.default_rng(0)
    params = {"kernel": (0.01 * rng.normal(size=(F, 2**17))).astype(np.float16)}
    hidden = rng.normal(size=(16, F)).astype(np.float16)
    labels = np.arange(16)
    loss = lambda params, hidden: (
        2.0**15 * tdjax.linear_cross_entropy(params, hidden, labels)
    )
    got, want = in_float16_and_32(jax.grad(loss), params, hidden)
    got, want = got["kernel"][:, 16:], want["kernel"][:, 16:]
    assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


def test_a_light_step_keeps_its_part_of_the_kernel_in_float16():
    hidden = np.zeros((2, F), np.float16)
    hidden[0, 0], hidden[1, 1:] = 3, 0.005
    params, *_ = make(dtype=np.float16)
    loss = lambda params, hidden: (
        2.0**15
        * tdjax.linear_cross_entropy(
            params, hidden, jnp.arange(2), weights=jnp.array([1, 1e-5])
        )
    )
    got, want = in_float16_and_32(jax.grad(loss), params, hidden)
    np.testing.assert_allclose(got["kernel"][1:], want["kernel"][1:], 5e-3, 1e-6)


def test_a_large_z_loss_does_not_leave_the_range_of_float16():
    params, hidden, labels = make(dtype=np.float16)
    loss = lambda params, hidden: (
        1e-4 * tdjax.linear_cross_entropy(params, 4 * hidden, labels, z_loss=3e4)
    )
    got, want = in_float16_and_32(jax.grad(loss, (0, 1)), params, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, 2e-2, 2e-3 * np.abs(b).max())


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_temperatures_do_not_leave_the_range_of_float16(temperature):
    """Their gradients are those of other logits, divided by the temperature."""
    params, hidden, labels = make(dtype=np.float16)
    wide = jax.tree.map(lambda x: x.astype(np.float32), (params, hidden))

    def gradient(hidden, params):
        total = lambda hidden: (
            1e-3 * temperature
            * tdjax.linear_log_probs(
                params, hidden, labels, temperature=temperature
            ).log_probs.sum()
        )  # fmt: skip
        return jax.grad(total)(hidden).astype(np.float32)

    got, want = gradient(hidden, params), gradient(*wide[::-1])
    np.testing.assert_allclose(got, want, 5e-3, 5e-6)


# Packing


@pytest.mark.parametrize("blocks", [{}, {"max_logits_bytes": 1000}], ids=str)
def test_batches_without_steps(blocks):
    params, hidden, labels = make(dtype=np.float32)
    loss = functools.partial(tdjax.linear_cross_entropy, reduction="sum", **blocks)
    gradient = jax.jit(jax.grad(loss))(params, hidden[:0], labels[:0])
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_a_mask_that_is_known_under_jit_is_checked():
    params, hidden, labels = make(dtype=np.float32)
    mask = jnp.asarray(some_mask())
    packed = lambda capacity: jax.jit(
        lambda hidden: tdjax.linear_cross_entropy(
            params, hidden, labels, mask=mask, capacity=capacity
        )
    )(hidden)
    want = tdjax.linear_cross_entropy(params, hidden, labels, mask=mask)
    np.testing.assert_allclose(packed(int(mask.sum())), want, 1e-6)
    with pytest.raises(ValueError, match="capacity=2 must be at least"):
        packed(2)


@pytest.mark.parametrize(
    ("reduction", "capacity"),
    some_quick([*itertools.product(["mean", "sum", "none"], [10, 13, 100])], 4, 1),
)
def test_packed_steps_give_the_same(capacity, reduction):
    params, hidden, labels = make()
    given = {**ALONE["all"], "reduction": reduction, "has_aux": True}
    count = valid_steps(labels, given["mask"], given["weights"], 3).sum()
    assert 0 < count <= capacity
    bad = np.where(given["mask"][..., None], hidden, np.nan)

    def run(hidden, **capacity):
        def total(params, hidden, weights):
            options = {**given, "weights": weights, **capacity}
            loss, aux = tdjax.linear_cross_entropy(params, hidden, labels, **options)
            return jnp.sum(loss), (loss, tuple(aux))

        grad = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        return quick_compile(grad, params, hidden, given["weights"])

    with x64():
        got, want = run(bad, capacity=capacity), run(hidden)
        assert_trees_close(got, want, TIGHT, TIGHT)
        masked = {n: given[n] for n in ("mask", "logits_soft_cap", "ignore_class")}
        packed = tdjax.linear_log_probs(
            params, bad, labels, capacity=capacity, **masked
        )
        plain = tdjax.linear_log_probs(params, hidden, labels, **masked)
        assert_trees_close(packed, plain, TIGHT, TIGHT)


def test_steps_beyond_the_capacity_are_nan():
    params, hidden, labels = make(dtype=np.float32)
    mask, capacity = some_mask(), 5
    beyond = mask & (np.cumsum(mask).reshape(mask.shape) > capacity)

    def run(reduction, mask):
        loss = lambda params, hidden: tdjax.linear_cross_entropy(
            params, hidden, labels, mask=mask, capacity=capacity, has_aux=True,
            reduction=reduction,
        )  # fmt: skip
        gradient = jax.grad(lambda *args: jnp.sum(loss(*args)[0]))
        return *loss(params, hidden), gradient(params, hidden)

    losses, aux, gradient = jax.jit(functools.partial(run, "none"))(mask)
    np.testing.assert_array_equal(np.isnan(losses), beyond)
    np.testing.assert_array_equal(np.isnan(aux.log_probs), beyond)
    np.testing.assert_array_equal(aux.predictions == np.iinfo(np.int32).min, beyond)
    assert not np.any(aux.correct[beyond])
    assert np.isnan(gradient["kernel"]).all()
    for reduction in ("mean", "sum"):
        loss, _, gradient = jax.jit(functools.partial(run, reduction))(mask)
        assert np.isnan(loss)
        assert np.isnan(gradient["kernel"]).all()
    with pytest.raises(ValueError, match=r"capacity=5 must be .* got \d+\."):
        run("mean", mask)


# Log-probabilities and entropies


OF_LOG_PROBS = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "logits_soft_cap": {"logits_soft_cap": 2.0},
    "mask": {"mask": some_mask()},
    "all": {
        "temperature": 1.5, "logits_soft_cap": 3.0, "mask": some_mask(),
        "ignore_class": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "blocks", "layout"),
    some_quick([*itertools.product(OF_LOG_PROBS, BLOCKS, LAYOUTS)], 11, 6),
)
def test_log_probs_and_entropies(name, blocks, layout):
    params, hidden, labels = make(layout)
    given = OF_LOG_PROBS[name]
    rng = np.random.default_rng(5)
    by_log_probs, by_entropies = rng.normal(size=(2, B, T))
    temperature = given.get("temperature", 1.0)
    rest = {n: x for n, x in given.items() if n != "temperature"}

    def run(fun, **blocks):
        def total(params, hidden, temperature):
            options = {**rest, **blocks}
            if "temperature" in given:
                options["temperature"] = temperature
            results = fun(params, hidden, labels, **options)
            sums = jnp.sum(by_log_probs * results[0] + by_entropies * results[1])
            return sums, tuple(results)

        grad = jax.value_and_grad(total, (0, 1), has_aux=True)
        return quick_compile(grad, params, hidden, temperature)

    with x64():
        got = run(tdjax.linear_log_probs, **blocks)
        want = run(log_probs_and_entropies)
        assert_trees_close(got, want, TIGHT, TIGHT)


def test_banned_words_have_no_share_in_entropies():
    params, hidden, labels = make()
    params["bias"][5:] = -np.inf
    few = {name: x[..., :5] for name, x in params.items()}

    def run(params):
        fun = lambda params: jnp.sum(
            tdjax.linear_log_probs(params, hidden, labels % 5).entropies
        )
        return jax.jit(jax.value_and_grad(fun))(params)

    with x64():
        got, want = run(params), run(few)
        np.testing.assert_allclose(got[0], want[0], TIGHT)
        np.testing.assert_allclose(got[1]["kernel"][:, :5], want[1]["kernel"], 1e-10)
        assert not np.any(got[1]["kernel"][:, 5:])


@pytest.mark.slow
def test_second_derivatives():
    params, hidden, labels = make()
    given = {"class_weights": np.arange(V) % 4 / 2, "label_smoothing": 0.3}
    given |= {"z_loss": 0.1, "logits_soft_cap": 2.0, "weights": some_weights()}

    def of_loss(loss, hidden):
        return loss(params, hidden, labels, **given)

    def of_log_probs(fun, hidden):
        log_probs, entropies = fun(params, hidden, labels, temperature=0.8)
        return jnp.sum(log_probs**2 + 2 * entropies**2)

    with x64():
        book = lambda *args, **options: cross_entropy(*args, **options)[0]
        for blocks in ({}, {"chunk_size": 3, "vocab_chunk_size": 5}):
            for total, ours, reference in (
                (of_loss, tdjax.linear_cross_entropy, book),
                (of_log_probs, tdjax.linear_log_probs, log_probs_and_entropies),
            ):
                ours = functools.partial(ours, **blocks)
                hessian = lambda fun, total=total: jax.jit(
                    jax.hessian(functools.partial(total, fun))
                )(hidden)
                np.testing.assert_allclose(
                    hessian(ours), hessian(reference), 1e-9, 1e-10
                )
                twice = lambda fun, total=total: jax.jit(
                    jax.grad(
                        lambda x: jnp.sum(
                            jax.grad(functools.partial(total, fun))(x) ** 2
                        )
                    )
                )(hidden)
                np.testing.assert_allclose(twice(ours), twice(reference), 1e-9, 1e-10)
