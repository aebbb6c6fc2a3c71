"""What the compiled programs of the softmax head hold."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdjax
from helpers import normal, slow_but
from tdjax._cross_entropy.sizes import Chunks, block_sizes

STEPS, FEATURES, WORDS = 64, 16, 96
LABELS = jnp.asarray(np.arange(STEPS) % WORDS)
PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]
EVERYTHING = {
    "label_smoothing": 0.1, "z_loss": 0.01, "logits_soft_cap": 5.0, "has_aux": True,
    "weights": np.ones(STEPS, np.float32),
    "class_weights": np.ones(WORDS, np.float32),
}  # fmt: skip


def make(layout, dtype, words=WORDS, steps=STEPS):
    kernel = normal(0, FEATURES, words, dtype=dtype)
    head = {"kernel": kernel} if layout == "kernel" else {"embedding": kernel.T}
    head["bias"] = normal(1, words, dtype=dtype)
    return head, normal(2, steps, FEATURES, dtype=dtype)


def loss_of(head, hidden, **options):
    loss = tdjax.linear_cross_entropy(head, hidden, LABELS, **options)
    return loss[0] if options.get("has_aux") else loss


def log_probs_of(head, hidden, **options):
    log_probs, entropies = tdjax.linear_log_probs(head, hidden, LABELS, **options)
    return jnp.sum(log_probs) + jnp.sum(entropies)


def losses_of(head, hidden, **options):
    return jnp.sum(loss_of(head, hidden, reduction="none", **options))


def lowered(fun, *args, platform="cpu"):
    exported = jax.export.export(jax.jit(fun), platforms=[platform])(*args)
    return exported.mlir_module()


@pytest.mark.parametrize(
    "platform",
    slow_but((0, 1), PLATFORMS),
)
@pytest.mark.parametrize("blocks", [{}, {"chunk_size": 8, "vocab_chunk_size": 32}])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("bfloat16", "kernel"),
        ("float16", "embedding"),
        pytest.param("bfloat16", "embedding", marks=pytest.mark.slow),
    ],
)
def test_half_precision_products_are_summed_in_float32(dtype, layout, blocks, platform):
    args = make(layout, dtype)
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    for fun, options in (
        (loss_of, {}), (loss_of, EVERYTHING), (losses_of, {}), (log_probs_of, {}),
    ):  # fmt: skip
        loss = functools.partial(fun, **options, **blocks)
        text = lowered(jax.grad(loss, (0, 1)), *args, platform=platform)
        pattern = r"stablehlo\.dot_general.* : \((.*)\) -> tensor<(\S*)>"
        types = re.findall(pattern, text)
        # Logits, and the gradients by the kernel and by hidden.
        assert len(types) >= 3
        for operands, result in types:
            assert re.findall(r"x([a-z]+\d+)>", operands) == [short, short]
            assert result.endswith("xf32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_many_chunks_are_as_exact_as_of_one(dtype):
    """The sums over chunks are of float32, not rounded at every chunk."""
    head, hidden = make("kernel", dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (head, hidden))
    want = jax.grad(loss_of)(*wide)["kernel"]
    for chunk_size in (1, STEPS):
        got = jax.grad(functools.partial(loss_of, chunk_size=chunk_size))(head, hidden)
        error = np.abs(got["kernel"].astype(jnp.float32) - want).max()
        assert error < 2 * jnp.finfo(dtype).eps * np.abs(want).max()


@pytest.mark.parametrize("of", [loss_of, losses_of, log_probs_of])
def test_an_embedding_is_never_transposed(of):
    args = make("embedding", "float32")
    program = jax.jit(jax.grad(of, (0, 1))).lower(*args).compile().as_text()
    moved = re.findall(r"f32\[(\d+),(\d+)\]\S* (?:transpose|copy)\(", program)
    assert (str(FEATURES), str(WORDS)) not in moved
    assert not [line for line in program.splitlines() if " transpose(" in line
                and f"[{FEATURES},{WORDS}]" in line]  # fmt: skip


@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_platform_gets_its_own_blocks(platform):
    """On an accelerator a block has thousands of rows, for its matrix units."""
    rows = {"cpu": 456, "cuda": 4096, "rocm": 4096, "tpu": 4096}[platform]
    head, hidden = make("kernel", "float32", words=32_000, steps=4096)
    labels = jnp.zeros(4096, int)
    loss = functools.partial(tdjax.linear_cross_entropy, labels=labels)
    text = lowered(jax.grad(loss), head, hidden, platform=platform)
    assert f"-> tensor<{rows}x32000xf32>" in text
    sizes = re.findall(r"-> tensor<(\d+)x32000xf32>", text)
    assert {*map(int, sizes)} <= {rows, FEATURES, 1}


def test_half_a_million_logits_fit_the_budget():
    head, hidden = make("kernel", "float32", words=5000)
    for most in (2**20, 2**16):
        loss = functools.partial(loss_of, max_logits_bytes=most)
        program = jax.jit(jax.grad(loss, (0, 1))).lower(head, hidden).compile()
        arrays = re.findall(r"f32\[(\d+),(\d+)\]", program.as_text())
        # Other than blocks only arrays of features.
        blocks = [(int(a), int(b)) for a, b in arrays if str(FEATURES) not in (a, b)]
        assert max(4 * a * b for a, b in blocks) <= most


@pytest.mark.parametrize("logits_soft_cap", [None, 5.0])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_the_memory_is_that_of_the_formula_in_the_docs(chunk_size, logits_soft_cap):
    head, hidden = make("kernel", "float32", words=20_000)
    blocks = {"chunk_size": chunk_size, "logits_soft_cap": logits_soft_cap}
    loss = functools.partial(loss_of, **blocks)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(head, hidden).compile()
    arrays = 2 if logits_soft_cap is None else 3
    formula = 4 * (arrays * chunk_size * 20_000 + 3 * STEPS * FEATURES)
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * formula


def test_a_symbolic_number_of_steps_keeps_the_budget():
    (steps,) = jax.export.symbolic_shape("steps")
    budget = Chunks(most_bytes=2**20)
    for sizes in block_sizes(steps, FEATURES, 100_000, budget, 4):
        assert 4 * sizes.rows * sizes.words <= 2**20
        assert 4 * sizes.forward_rows * sizes.forward_words <= 2**20
        assert sizes.rows >= 256


def test_only_steps_may_be_symbolic():
    (words,) = jax.export.symbolic_shape("words")
    shapes = (FEATURES, words), (STEPS, FEATURES)
    kernel, hidden = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    loss = jax.jit(lambda kernel, hidden: loss_of({"kernel": kernel}, hidden))
    with pytest.raises(ValueError, match=r"sizes that are known, got .*words"):
        jax.export.export(loss)(kernel, hidden)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_keep_no_logits_of_other_chunks(reduction):
    head, hidden = make("kernel", "float32", words=4096)

    def slope(head, hidden):
        loss = functools.partial(loss_of, reduction=reduction, max_logits_bytes=2**16)
        gradient = jax.grad(lambda hidden: jnp.sum(loss(head, hidden)))(hidden)
        return jnp.sum(gradient**2)

    program = jax.jit(jax.grad(slope, (0, 1))).lower(head, hidden).compile()
    all_logits = 4 * STEPS * 4096
    assert program.memory_analysis().temp_size_in_bytes < all_logits


def test_schedules_do_not_compile_again():
    head, hidden = make("kernel", "float32")
    calls = []

    @jax.jit
    def gradient(head, z_loss, label_smoothing, temperature):
        calls.append(1)
        loss = loss_of(head, hidden, z_loss=z_loss, label_smoothing=label_smoothing)
        return loss + log_probs_of(head, hidden, temperature=temperature)

    for step in range(3):
        got = gradient(head, 0.1 * step, 0.2 * step, 1.0 + step)
        want = loss_of(head, hidden, z_loss=0.1 * step, label_smoothing=0.2 * step)
        want += log_probs_of(head, hidden, temperature=1.0 + step)
        np.testing.assert_allclose(got, want, 1e-6)
    assert len(calls) == 1
