"""Everything works, with the same numbers, under JAX's strict modes.

Under `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` the
programs are traced, and must be the same operations as without. `jax_debug_nans` looks
at the numbers, so there they run, operation by operation.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdjax
from helpers import assert_trees_close, normal, slow_but

B, T, F, V = 3, 4, 5, 7
LENGTHS = np.array([4, 2, 0])
MASK = tdjax.lengths_to_mask(LENGTHS, T)
MODES = {
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "nans": lambda: jax.debug_nans(True),
}
DTYPES = ["float32", "bfloat16", "float16"]
LOWERINGS = [
    {},
    {"method": "fold"},
    {"chunk_size": 3},
    {"method": "fold", "chunk_size": 1, "unroll": True, "remat": True},
    {"capacity": 6},
    {"capacity": 8, "method": "fold", "chunk_size": 3},
]


def check(mode, run, *args):
    if mode == "nans":
        want = jax.jit(run)(*args)
        with MODES[mode]():
            assert_trees_close(run(*args), want, 1e-2, 1e-2)
        return
    want = str(jax.make_jaxpr(run)(*args))
    with MODES[mode]():
        got = str(jax.make_jaxpr(run)(*args))
    address = r"0x[0-9a-f]+"
    assert re.sub(address, "", got) == re.sub(address, "", want)


modes = pytest.mark.parametrize("mode", MODES)
# Operation by operation, one dtype has to do.
modes_and_dtypes = pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        pytest.param(
            mode,
            dtype,
            marks=() if dtype in DTYPES[: 1 + (mode == "dtype")] else pytest.mark.slow,
        )
        for mode in ("dtype", "rank")
        for dtype in DTYPES
    ]
    + [("nans", "float32")],
)


@modes_and_dtypes
def test_the_dense_families(mode, dtype):
    def run(key, x):
        sizes = {"in_features": F, "features": 2}
        per_step = tdjax.init_per_step_dense(key, T, F, 2, dtype=dtype)
        plain = tdjax.init_dense(key, **sizes, dtype=dtype)
        flat = tdjax.init_flatten_dense(key, T, F, 2, dtype=dtype)
        loss = lambda plain, per_step, flat, x: [
            tdjax.dense(plain, x),
            tdjax.per_step_dense(per_step, x),
            tdjax.flatten_dense(flat, x),
            tdjax.flatten_dense(tdjax.as_flatten(plain, T), x),
            tdjax.per_step_dense(tdjax.as_per_step(plain, T), x),
        ]
        return jax.vjp(loss, plain, per_step, flat, x)[0], jax.grad(
            lambda *args: sum(jnp.sum(y.astype(jnp.float32)) for y in loss(*args)),
            (0, 1, 2, 3),
        )(plain, per_step, flat, x)

    check(mode, run, jax.random.key(0), normal(0, B, T, F, dtype=dtype))


@modes
@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_masks(mode, dtype):
    def run(lengths, values):
        mask = tdjax.lengths_to_mask(lengths, T)
        turned = tdjax.lengths_to_mask(lengths, T, time_major=True)
        means = tdjax.masked_mean(values, mask), tdjax.masked_mean(values, mask, 1)
        return mask, turned, means

    check(mode, run, jnp.asarray(LENGTHS, dtype), normal(0, B, T, F))


@modes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "int8"])
def test_masked_means_of_any_dtype(mode, dtype):
    values = normal(0, B, T).astype(dtype)
    check(mode, lambda values: tdjax.masked_mean(values, MASK, 1), values)


@modes_and_dtypes
@pytest.mark.parametrize("options", slow_but((1, 3, 4), LOWERINGS), ids=str)
def test_every_lowering_with_a_mask_and_its_gradient(mode, dtype, options):
    apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), **options)

    def run(params, x, mask):
        loss = lambda params, x: jnp.sum(apply(params, x, mask=mask) ** 2)
        return apply(params, x, mask=mask), jax.grad(loss, (0, 1))(params, x)

    params = tdjax.init_dense(jax.random.key(0), F, 2, dtype=dtype)
    x = normal(0, B, T, F, dtype=dtype)
    check(mode, run, params, x, MASK)


@modes_and_dtypes
@pytest.mark.parametrize(
    ("options", "reduction"),
    [
        pytest.param(options, reduction, marks=() if quick else pytest.mark.slow)
        for options, quick_reduction in (
            ({}, "mean"),
            ({"chunk_size": 3, "vocab_chunk_size": 2, "label_smoothing": 0.1}, "none"),
            ({"z_loss": 1e-2, "logits_soft_cap": 5.0, "vocab_chunk_size": 3}, "mean"),
            ({"weights": True, "class_weights": True, "capacity": 8}, "none"),
        )
        for reduction in ("mean", "none")
        for quick in [reduction == quick_reduction]
    ],
    ids=str,
)
def test_the_loss_and_its_gradient(mode, dtype, options, reduction):
    labels = jnp.asarray([[0, 1, 2, 6], [3, -100, 0, 0], [5, -100, 4, 1]])

    weights = {"weights": normal(2, B, T) ** 2, "class_weights": normal(3, V) ** 2}
    options = {**options, **{n: x for n, x in weights.items() if n in options}}

    def run(params, hidden, labels, mask):
        def loss(params, hidden):
            losses, aux = tdjax.linear_cross_entropy(
                params, hidden, labels, mask=mask, ignore_class=-100,
                reduction=reduction, has_aux=True, **options,
            )  # fmt: skip
            return jnp.sum(losses), (losses, aux)

        return jax.grad(loss, (0, 1), has_aux=True)(params, hidden)

    params = tdjax.init_dense(jax.random.key(0), F, V, dtype=dtype)
    params["bias"] = normal(1, V, dtype=dtype)
    check(mode, run, params, normal(0, B, T, F, dtype=dtype), labels, MASK)


@modes_and_dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5, "chunk_size": 3, "vocab_chunk_size": 2, "capacity": 8}],
    ids=str,
)
def test_log_probs_and_their_gradient(mode, dtype, options):
    labels = jnp.asarray([[0, 1, 2, 6], [3, -100, 0, 0], [5, -100, 4, 1]])

    def run(params, hidden, labels, mask):
        def total(params, hidden):
            results = tdjax.linear_log_probs(
                params, hidden, labels, mask=mask, ignore_class=-100, **options
            )
            return jnp.sum(results.log_probs * results.entropies), results

        return jax.grad(total, (0, 1), has_aux=True)(params, hidden)

    embedding = {"embedding": normal(1, V, F, dtype=dtype)}
    check(mode, run, embedding, normal(0, B, T, F, dtype=dtype), labels, MASK)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=False)(x)
        self.sow("intermediates", "x", x)
        return nn.Dense(2)(x)


@modes
@pytest.mark.filterwarnings("ignore:With mask=, the layer writes statistics")
@pytest.mark.parametrize("options", slow_but((1, 2), LOWERINGS[:3]), ids=str)
@pytest.mark.parametrize("carry", [False, "batch_stats"])
def test_layers_with_state_and_noise(mode, options, carry):
    if carry and options.get("method") == "fold":
        pytest.skip("state goes from step to step under vmap only")
    linen = tdjax.linen.TimeDistributed(Block(), variable_carry=carry, **options)
    norm = nnx.BatchNorm(F, rngs=nnx.Rngs(0))
    graph, start = nnx.split(tdjax.nnx.TimeDistributed(norm, **options))

    def run(x):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = linen.init(rngs, x)
        results = linen.apply(
            variables, x, mask=MASK, rngs=rngs, mutable=["batch_stats", "intermediates"]
        )
        model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, start))
        return results, model(x, mask=MASK), nnx.to_pure_dict(nnx.state(model))

    check(mode, run, normal(0, B, T, F))


@modes
def test_step_influence_and_the_tuner(mode):
    with MODES[mode]():
        pattern = tdjax.step_influence(lambda x: jnp.cumsum(x, 1), normal(0, B, T, F))
        assert pattern.tolist() == np.tri(T, dtype=bool).tolist()
        apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
        params = tdjax.init_dense(jax.random.key(0), F, 2)
        tuning = tdjax.autotune(
            apply, params, normal(0, B, T, F), mask=MASK, argnums=0, budget=0.5
        )
    assert tuning.best.measured
