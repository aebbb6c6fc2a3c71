"""`method="auto"` without a table: what the rules choose, and that it is right."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tdjax
from helpers import assert_trees_close, assert_trees_equal, normal
from tdjax._steps.rules import block_size

IMAGES = normal(0, 4, 11, 24, 24, 8)
KERNEL = 0.1 * normal(1, 3, 3, 8, 32)


def convolve(kernel, x):
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sin(y).mean((1, 2))


def over_time(method, fun=convolve, **options):
    return tdjax.time_distributed(fun, in_axes=(None, 1), method=method, **options)


def count(run, *args, platform="cpu", of="stablehlo.convolution"):
    exported = jax.export.export(jax.jit(run), platforms=[platform])(*args)
    return len(re.findall(rf"{re.escape(of)}\b", exported.mlir_module()))


def both(run, **options):
    score = lambda kernel, x: jnp.sum(jnp.cos(run(kernel, x, **options)))
    return lambda *args: (
        run(*args, **options), jax.grad(score, (0, 1))(*args)
    )  # fmt: skip


def test_convolutions_over_images_run_in_blocks_on_a_cpu_alone():
    run = over_time("auto")
    # Of 2 steps each, and of 1 at the end.
    assert count(run, KERNEL, IMAGES) == 6
    assert count(run, KERNEL, IMAGES, platform="cuda") == 1
    assert count(run, KERNEL, IMAGES, platform="tpu") == 1
    assert count(over_time("vmap"), KERNEL, IMAGES) == 1


MASK = jnp.arange(11) < jnp.asarray([[11], [3], [0], [7]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_blocks_give_the_numbers_of_vmap(mask):
    auto, vmap = (both(over_time(m), mask=mask) for m in ("auto", "vmap"))
    got = jax.jit(auto)(KERNEL, IMAGES)
    assert_trees_close(got, jax.jit(vmap)(KERNEL, IMAGES), 1e-4, 1e-4)


def test_outside_of_jit_nothing_changes(monkeypatch):
    monkeypatch.setattr(jax, "make_jaxpr", pytest.fail)
    got, want = (over_time(m)(KERNEL, IMAGES) for m in ("auto", "vmap"))
    assert_trees_close(got, want)


def test_packed_steps_too():
    auto, vmap = (over_time(m, capacity=24) for m in ("auto", "vmap"))
    packed = lambda run: lambda kernel, x: run(kernel, x, mask=MASK)
    args = jnp.tile(KERNEL, 4), IMAGES
    assert count(packed(auto), *args) == 8
    got, want = packed(auto)(*args), packed(vmap)(*args)
    assert_trees_close(got, want)


@pytest.mark.parametrize("name", ["time axis", "shared result", "one step", "1d"])
def test_where_blocks_are_not_the_same_or_no_faster_there_are_none(name):
    x, kernel, options, fun = IMAGES, KERNEL, {}, convolve
    if name == "time axis":
        options = {"axis_name": "time"}
        fun = lambda k, x: convolve(k, x) - jax.lax.pmean(convolve(k, x), "time")
    elif name == "shared result":
        options = {"out_axes": (1, None)}
        fun = lambda k, x: (convolve(k, x), convolve(k, jnp.ones((1, 24, 24, 8))))
    elif name == "one step":
        x = IMAGES[:, :1]
    else:
        x, kernel = normal(0, 4, 11, 2400, 8), normal(1, 9, 8, 16)
        fun = lambda k, x: jax.lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
    auto, vmap = (over_time(m, fun, **options) for m in ("auto", "vmap"))
    assert count(auto, kernel, x) == count(vmap, kernel, x)
    assert_trees_close(auto(kernel, x), vmap(kernel, x))


def test_a_small_convolution_and_a_large_program_stay_whole():
    images = jnp.ones((1, 8, 4, 4, 8))
    assert count(over_time("auto"), KERNEL, images) == 1

    def deep(kernel, x):
        y = convolve(kernel, x)
        for _ in range(200):
            y = jnp.sin(y)
        return y

    assert count(over_time("auto", deep), KERNEL, IMAGES) == 1


def test_grouped_convolutions_do_not_count():
    def grouped(x):
        return jax.lax.conv_general_dilated(
            x, jnp.ones((3, 3, 1, 800)), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=8,
        )  # fmt: skip

    program = jax.make_jaxpr(jax.vmap(grouped))(jnp.ones((9, 4, 16, 16, 8)))
    assert block_size(program, 9) is None


@pytest.mark.parametrize("shape", ["4, t", "b, 11", "b, t"])
def test_symbolic_sizes_are_exported(shape):
    sizes = jax.export.symbolic_shape(f"{shape}, 24, 24, 8")
    x = jax.ShapeDtypeStruct(sizes, jnp.float32)
    run = jax.jit(over_time("auto"))
    exported = jax.export.export(run)(KERNEL, x)
    assert_trees_close(exported.call(KERNEL, IMAGES), run(KERNEL, IMAGES))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(0.5, deterministic=not train)(x).mean((1, 2))


def test_linen_keeps_noise_statistics_and_gradients():
    models = [
        tdjax.linen.TimeDistributed(Encoder(), method=m) for m in ("auto", "vmap")
    ]
    variables = models[0].init(jax.random.key(0), IMAGES, train=False)

    def run(model):
        def loss(params):
            given = {**variables, "params": params}
            rngs = {"dropout": jax.random.key(1)}
            y, state = model.apply(
                given, IMAGES, mask=MASK, rngs=rngs, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(y)), (y, state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    with pytest.warns(UserWarning, match="stand|copies"):
        auto, vmap = map(run, models)
    assert_trees_close(auto, vmap, 1e-4, 1e-4)


def test_nnx_keeps_noise_statistics_and_gradients():
    class Frames(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.conv(x))).mean((1, 2))

    def run(method):
        model = tdjax.nnx.TimeDistributed(Frames(nnx.Rngs(0)), method=method)

        @nnx.jit
        def step(model, x):
            loss = lambda model: jnp.sum(jnp.sin(model(x)))
            return nnx.value_and_grad(loss)(model)

        value, gradients = step(model, IMAGES)
        return value, nnx.to_pure_dict(gradients), nnx.to_pure_dict(nnx.state(model))

    auto, vmap = run("auto"), run("vmap")
    counts = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.uint32]
    assert_trees_equal(counts(auto), counts(vmap))
    floats = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
    assert_trees_close(floats(auto), floats(vmap), 1e-4, 1e-4)
