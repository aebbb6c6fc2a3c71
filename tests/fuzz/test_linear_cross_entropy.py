"""The fused loss with random options against NumPy, one step after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

import tdjax
from helpers import BAD, x64

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    params: dict[str, Any]
    hidden: Any
    labels: Any
    mask: Any
    weights: Any  # Of the steps' losses, for reduction="none".
    options: dict[str, Any]


# Integers in float64 that come from eight bits stay the same in every dtype.
@st.composite
def arrays(draw, *shape):
    seed = draw(st.integers(0, 999))
    largest = draw(st.sampled_from([1, 1, 4, 60]))
    return np.random.default_rng(seed).integers(-8, 9, shape) * largest / 8


@st.composite
def cases(draw):
    steps = tuple(draw(st.lists(st.sampled_from([3, 1, 2, 4, 3, 0]), max_size=3)))
    features, words = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    params = {"kernel": draw(arrays(features, words))}
    if draw(st.booleans()):
        params["bias"] = draw(arrays(words))
    hidden = draw(arrays(*steps, features))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    labels = rng.integers(0, words, steps)
    labels = labels.astype(draw(st.sampled_from(["int32", "int64", "uint8"])))
    mask = np.asarray(rng.random(steps) < draw(st.sampled_from([0.8, 0.5, 0.9, 0.0])))
    ignored = draw(st.sampled_from([None, 0, words - 1, -100, 200, 2**31]))
    # Labels that are no words, where they don't count.
    info = np.iinfo(labels.dtype)
    wrong = [w for w in (-1, words, info.min, info.max) if info.min <= w]
    if draw(st.booleans()):
        labels = np.where(mask, labels, rng.choice(wrong, steps)).astype(labels.dtype)
    else:
        mask = None
    if ignored is not None and info.min <= ignored <= info.max:
        is_ignored = rng.random(steps) < 0.3
        labels = np.where(is_ignored, ignored, labels).astype(labels.dtype)
    chunks = st.one_of(st.none(), st.integers(1, 9))
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0, 0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.01, 1])),
        "logits_soft_cap": draw(st.sampled_from([None, None, 0.5, 30])),
        "ignore_class": ignored,
        "chunk_size": draw(chunks),
        "vocab_chunk_size": draw(chunks),
    }
    return Case(params, hidden, labels, mask, rng.normal(size=steps), options)


def softmax(logits):
    largest = logits.max()
    normalizer = largest + np.log(np.sum(np.exp(logits - largest)))
    return normalizer, np.exp(logits - normalizer)


def reference(case):
    """`(loss, gradients by kernel, bias and hidden)`, float64."""
    options, words = case.options, case.params["kernel"].shape[1]
    cap, z_loss = options["logits_soft_cap"], options["z_loss"]
    smoothing = options["label_smoothing"]
    bias = case.params.get("bias", np.zeros(words))
    valid = np.ones(case.labels.shape, bool) if case.mask is None else case.mask
    if options["ignore_class"] is not None:
        valid = valid & (case.labels.astype(object) != options["ignore_class"])
    valid = np.asarray(valid, bool)
    scale = {
        "none": case.weights,
        "sum": np.ones(valid.shape),
        "mean": np.full(valid.shape, 1 / max(valid.sum(), 1)),
    }[options["reduction"]]
    losses = np.zeros(valid.shape)
    d_kernel, d_bias = np.zeros_like(case.params["kernel"]), np.zeros(words)
    d_hidden = np.zeros_like(case.hidden)
    for step in zip(*np.nonzero(valid)) if valid.ndim else [()] * bool(valid):
        h = case.hidden[step]
        logits, slope = h @ case.params["kernel"] + bias, 1.0
        if cap is not None:
            slope = 1 - np.tanh(logits / cap) ** 2
            logits = cap * np.tanh(logits / cap)
        normalizer, shares = softmax(logits)
        target = (1 - smoothing) * np.eye(words)[case.labels[step]] + smoothing / words
        losses[step] = normalizer - target @ logits + z_loss * normalizer**2
        d_logits = (shares * (1 + 2 * z_loss * normalizer) - target) * slope
        d_logits = d_logits * scale[step]
        d_kernel += np.outer(h, d_logits)
        d_bias += d_logits
        d_hidden[step] = case.params["kernel"] @ d_logits
    if options["reduction"] != "none":
        losses = np.sum(losses * scale)
    gradients = {"kernel": d_kernel, "bias": d_bias}
    return losses, ({name: gradients[name] for name in case.params}, d_hidden)


def ours(case, dtype):
    params, hidden = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (case.params, case.hidden)
    )
    if case.mask is not None:
        bad = np.resize(BAD, hidden.shape).astype(dtype)
        hidden = jnp.where(case.mask[..., None], hidden, bad)
    weights = case.weights if case.options["reduction"] == "none" else 1.0

    def total(params, hidden):
        loss = tdjax.linear_cross_entropy(
            params, hidden, case.labels, mask=case.mask, **case.options
        )
        return jnp.sum(loss * weights), loss

    compute = jax.value_and_grad(total, (0, 1), has_aux=True)
    (_, loss), gradients = jax.jit(compute)(params, hidden)
    # Without gradients it goes another way.
    alone = jax.jit(lambda *args: total(*args)[1])(params, hidden)
    return loss, alone, gradients


TOLERANCES = {"float64": 1e-11, "float32": 5e-3}


def assert_close(got, want, tolerance):
    scale = max(1.0, np.abs(want).max(initial=0))
    assert got.shape == want.shape
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got / scale, want / scale, 0, tolerance)


@settings(max_examples=max(40, settings.default.max_examples))
@given(cases(), st.sampled_from(["float64", "float64", "float32"]))
def test_the_loss_and_its_gradients_are_those_of_numpy(case, dtype):
    note(f"{dtype} {case}")
    want, want_gradients = reference(case)
    with x64():
        loss, alone, gradients = ours(case, dtype)
        assert loss.dtype == alone.dtype == dtype
        for got in (loss, alone):
            assert_close(got, np.asarray(want), TOLERANCES[dtype])
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients))
        for got, want_gradient in pairs:
            assert_close(got, want_gradient, TOLERANCES[dtype])
