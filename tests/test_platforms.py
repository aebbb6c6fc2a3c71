"""Every public function lowers for every platform, whatever the host has."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import tdjax
from helpers import normal

PLATFORMS = ["cuda", "rocm", "tpu", "cpu"]
BATCH, TIME, FEATURES, WORDS = 2, 6, 3, 5
KEY = jax.random.key(0)
X = normal(0, BATCH, TIME, FEATURES)
IMAGES = normal(0, BATCH, TIME, 8, 8, 3)
MASK = jnp.arange(TIME) < jnp.asarray([[6], [3]])
LABELS = jnp.zeros((BATCH, TIME), jnp.int32)
DENSE = tdjax.init_dense(KEY, FEATURES, WORDS)
FLAT = tdjax.init_flatten_dense(KEY, TIME, FEATURES, WORDS)
PER_STEP = tdjax.init_per_step_dense(KEY, TIME, FEATURES, WORDS)

# What has no program of its own: it runs programs, draws, or holds results.
NOT_LOWERED = {"Tuning", "assert_causal", "autotune", "plot_step_influence", "tuning"}
MODULES = {"linen", "nnx", "keras"}


def over_time(fun=tdjax.dense, **options):
    return tdjax.time_distributed(fun, in_axes=(None, 1), **options)


FUNCTIONS = {
    "as_flatten": (lambda p: tdjax.as_flatten(p, TIME), PER_STEP),
    "as_per_step": (lambda p: tdjax.as_per_step(p, TIME), FLAT),
    "dense": (tdjax.dense, DENSE, X),
    "flatten_dense": (tdjax.flatten_dense, FLAT, X),
    "init_dense": (lambda key: tdjax.init_dense(key, 3, 5), KEY),
    "init_flatten_dense": (lambda key: tdjax.init_flatten_dense(key, 6, 3, 5), KEY),
    "init_per_step_dense": (lambda key: tdjax.init_per_step_dense(key, 6, 3, 5), KEY),
    "lengths_to_mask": (lambda n: tdjax.lengths_to_mask(n, TIME), jnp.array([6, 3])),
    "linear_cross_entropy": (tdjax.linear_cross_entropy, DENSE, X, LABELS),
    "linear_log_probs": (tdjax.linear_log_probs, DENSE, X, LABELS),
    "masked_mean": (tdjax.masked_mean, X, MASK),
    "per_step_dense": (tdjax.per_step_dense, PER_STEP, X),
    "step_influence": (lambda x: tdjax.step_influence(jnp.sin, x), X),
    "time_distributed": (over_time(), DENSE, X),
}
# How the steps are compiled, and what stands around them.
OPTIONS = {
    "fold": {"method": "fold"},
    "auto": {"method": "auto"},
    "loop": {"chunk_size": 2},
    "loop of folds, remat": {"method": "fold", "chunk_size": 4, "remat": True},
    "straight line": {"chunk_size": 2, "unroll": True},
    "packed": {"capacity": 9},
}


def linen_of(module):
    variables = jax.eval_shape(module.init, KEY, X)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables)
    return module.apply, variables, X


def nnx_of(module):
    graphdef, state = nnx.split(module)
    return lambda state, x: nnx.merge(graphdef, state)(x), state, X


def head_of(module):
    run, variables, x = linen_of(module)
    return lambda variables: run(variables, x, LABELS), variables


LAYERS = {
    "linen.TimeDistributed": lambda: linen_of(
        tdjax.linen.TimeDistributed(nn.Dense(WORDS), chunk_size=2)
    ),
    "linen.FlattenDense": lambda: linen_of(tdjax.linen.FlattenDense(WORDS)),
    "linen.PerStepDense": lambda: linen_of(tdjax.linen.PerStepDense(WORDS)),
    "linen.CrossEntropyHead": lambda: head_of(tdjax.linen.CrossEntropyHead(WORDS)),
    "nnx.TimeDistributed": lambda: nnx_of(
        tdjax.nnx.TimeDistributed(nnx.Linear(3, WORDS, rngs=nnx.Rngs(0)), chunk_size=2)
    ),
    "nnx.FlattenDense": lambda: nnx_of(
        tdjax.nnx.FlattenDense(TIME, FEATURES, WORDS, rngs=nnx.Rngs(0))
    ),
    "nnx.PerStepDense": lambda: nnx_of(
        tdjax.nnx.PerStepDense(TIME, FEATURES, WORDS, rngs=nnx.Rngs(0))
    ),
    "nnx.CrossEntropyHead": lambda: nnx_of(
        tdjax.nnx.CrossEntropyHead(FEATURES, WORDS, rngs=nnx.Rngs(0))
    ),
}


def lowered(platform, fun, *args):
    return jax.export.export(jax.jit(fun), platforms=[platform])(*args).mlir_module()


def with_gradient(fun):
    """The results, and the gradient by all floats of the arguments."""

    def run(*args):
        leaves, treedef = jax.tree.flatten(args)
        is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def of_floats(floats):
            fill = iter(floats)
            filled = [next(fill) if f else x for f, x in zip(is_float, leaves)]
            results = jax.tree.leaves(fun(*treedef.unflatten(filled)))
            sums = [
                jnp.sum(y) for y in results if jnp.issubdtype(y.dtype, jnp.floating)
            ]
            return sum(sums, jnp.zeros(())), results

        floats = [x for x, f in zip(leaves, is_float) if f]
        return jax.value_and_grad(of_floats, has_aux=True)(floats)

    return run


def test_the_list_of_functions_is_whole():
    assert set(FUNCTIONS) == set(tdjax.__all__) - NOT_LOWERED - MODULES
    of = lambda module, name: {f"{name}.{each}" for each in module.__all__}
    names = of(tdjax.linen, "linen") | of(tdjax.nnx, "nnx")
    assert set(LAYERS) | {"linen.autotune", "nnx.autotune"} == names


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_function_lowers(platform):
    for fun, *args in FUNCTIONS.values():
        assert lowered(platform, with_gradient(fun), *args)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_layer_lowers(platform):
    for make in LAYERS.values():
        fun, *args = make()
        assert lowered(platform, with_gradient(fun), *args)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_lowering_lowers(platform):
    for options in OPTIONS.values():
        run = lambda params, x, options=options: over_time(**options)(
            params, x, mask=MASK
        )
        assert lowered(platform, with_gradient(run), DENSE, X)


CONVOLUTION = "stablehlo.convolution"
KERNEL = normal(1, 3, 3, 3, 4)


def convolve(kernel, x):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def count(text, operation):
    return len(re.findall(rf"{re.escape(operation)}\b", text))


def own_loop(kernel, x):
    blocks = jnp.moveaxis(x, 1, 0)
    y = lax.scan(lambda _, x: (None, convolve(kernel, x)), None, blocks)[1]
    return jnp.moveaxis(y, 0, 1)


@pytest.mark.parametrize("platform", PLATFORMS[:3])
def test_no_rewriting_for_a_cpu_is_in_the_programs_of_accelerators(platform):
    text = lowered(
        platform, with_gradient(over_time(convolve, chunk_size=1)), KERNEL, IMAGES
    )
    reference = lowered(platform, with_gradient(own_loop), KERNEL, IMAGES)
    specs = lambda text: sorted(
        re.findall(r"dim_numbers = (\[.*?\]x.*?->\[.*?\])", text)
    )
    assert specs(text) == specs(reference)
    assert len(specs(text)) == 3
    transposes = count(text, "stablehlo.transpose")
    assert transposes <= count(reference, "stablehlo.transpose")


def test_the_program_for_a_cpu_has_the_orders_that_are_fast_there():
    text = lowered(
        "cpu", with_gradient(over_time(convolve, chunk_size=1)), KERNEL, IMAGES
    )
    orders = re.findall(r"dim_numbers = \[(.*?)\]x\[(.*?)\]->\[(.*?)\]", text)
    fast = "b, 0, 1, f", "0, 1, i, o", "b, 0, 1, f"
    assert orders == [fast] * 3


@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_a_product_for_an_accelerator_reads_its_operands_as_they_are(method):
    text = lowered("cuda", over_time(method=method), DENSE, X)
    ((x, kernel),) = re.findall(r"stablehlo.dot_general (%\w+), (%\w+)", text)
    transposed = re.findall(r"(%\w+) = stablehlo.transpose", text)
    assert not {x, kernel} & {*transposed}
    # What vmap adds stands around the sum with the bias, which is fused with it.
    assert len(transposed) == (2 if method == "vmap" else 0)
