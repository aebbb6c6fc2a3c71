"""Convolutions inside a compiled loop: the same numbers, in the order XLA runs fast."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import tdjax
from helpers import assert_trees_close, normal, quick_compile

ORDERS = [
    ("NHWC", "HWIO", "NHWC"),
    ("NCHW", "OIHW", "NCHW"),
    ("HWNC", "IHWO", "CHNW"),
    ("NWC", "WIO", "NWC"),
    ("NCW", "OIW", "NCW"),
    ("NDHWC", "DHWIO", "NDHWC"),
]
OPTIONS = [
    {},
    {"window_strides": 2, "padding": "VALID"},
    {"rhs_dilation": 2},
    {"lhs_dilation": 2, "padding": (2, 1)},
]


def arrays(order, features=(3, 4), batch=2, steps=5):
    sizes = {"N": batch, "C": features[0], "D": 6, "H": 7, "W": 5}
    taps = {"I": features[0], "O": features[1], "D": 2, "H": 3, "W": 2}
    x = normal(0, steps, *(sizes[axis] for axis in order[0]))
    kernel = normal(1, *(taps[axis] for axis in order[1]))
    return jnp.moveaxis(x, 0, 1), kernel


def convolution(order, window_strides=1, padding="SAME", **dilations):
    space = len(order[0]) - 2
    options = {name: (value,) * space for name, value in dilations.items()}
    padding = [padding] * space if isinstance(padding, tuple) else padding
    return lambda kernel, x: lax.conv_general_dilated(
        x,
        kernel,
        (window_strides,) * space,
        padding,
        dimension_numbers=order,
        **options,
    )


def loss(apply):
    return lambda *args: jnp.sum(jnp.sin(apply(*args)))


def value_and_gradients(apply):
    return jax.value_and_grad(loss(apply), (0, 1))


def loop_over_steps(fun):
    """The reference: JAX's own convolution, one step after the other."""
    return lambda kernel, x: jnp.stack(
        [fun(kernel, x[:, t]) for t in range(x.shape[1])], 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_order_keeps_its_numbers_and_derivatives(order, options):
    fun = convolution(order, **options)
    x, kernel = arrays(order)
    apply = tdjax.time_distributed(fun, in_axes=(None, 1), chunk_size=2)
    both = lambda apply: quick_compile(value_and_gradients(apply), kernel, x)
    assert_trees_close(both(apply), both(loop_over_steps(fun)), 1e-4, 1e-4)


@pytest.mark.parametrize("method", ["vmap", "fold"])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_every_loop_over_blocks_agrees(method, chunk_size):
    fun = convolution(ORDERS[0])
    x, kernel = arrays(ORDERS[0])
    apply = tdjax.time_distributed(
        fun, in_axes=(None, 1), method=method, chunk_size=chunk_size, remat=True
    )
    both = lambda apply: quick_compile(value_and_gradients(apply), kernel, x)
    assert_trees_close(both(apply), both(loop_over_steps(fun)), 1e-4, 1e-4)


def test_forward_mode_second_derivatives_and_vmap():
    fun = convolution(ORDERS[1])
    x, kernel = arrays(ORDERS[1])
    apply = tdjax.time_distributed(fun, in_axes=(None, 1), chunk_size=1)

    def derivatives(apply):
        tangents = normal(2, *kernel.shape), normal(3, *x.shape)
        forward = jax.jvp(apply, (kernel, x), tangents)[1]
        hessian = jax.jvp(jax.grad(loss(apply), (0, 1)), (kernel, x), tangents)[1]
        kernels = jnp.stack([kernel, 2 * kernel])
        mapped = jax.vmap(jax.grad(loss(apply), (0, 1)), (0, None))(kernels, x)
        return forward, hessian, mapped

    want = derivatives(loop_over_steps(fun))
    assert_trees_close(derivatives(apply), want, 1e-4, 1e-4)


class Frame(nn.Module):
    """Convolutions behind `jit` and `remat`, as in real models."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.jit(nn.remat(nn.Conv))(4, (3, 3))(x)
        return nn.relu(nn.Conv(3, (2, 2), strides=2)(x))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only XLA for CPU needs it")
def test_no_convolution_in_the_loop_is_in_an_order_that_xla_runs_slowly():
    x = normal(0, 2, 6, 8, 8, 3)
    params = Frame().init(jax.random.key(0), x[:, 0])
    apply = tdjax.time_distributed(Frame().apply, in_axes=(None, 1), chunk_size=2)
    program = jax.jit(jax.grad(loss(apply), (0, 1))).lower(params, x).compile()
    orders = re.findall(r" convolution\(.*?dim_labels=([^,]*)", program.as_text())
    assert len(orders) >= 9
    assert set(orders) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(("argnums", "count"), [((0, 1), 9), (0, 8), (1, 6)])
def test_only_the_wanted_gradients_are_computed(argnums, count):
    x = normal(0, 2, 6, 8, 8, 3)
    params = Frame().init(jax.random.key(0), x[:, 0])
    apply = tdjax.time_distributed(Frame().apply, in_axes=(None, 1), chunk_size=2)
    program = jax.jit(jax.grad(loss(apply), argnums)).lower(params, x).as_text()
    # Three forward, and one for each kernel and each input.
    assert program.count("stablehlo.convolution") == count


def test_a_grouped_convolution_and_one_of_integers_stay_as_they_are():
    x = normal(0, 2, 4, 7, 5, 4)
    kernel = normal(1, 3, 2, 1, 4)
    grouped = lambda kernel, x: lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=ORDERS[0], feature_group_count=4
    )
    apply = tdjax.time_distributed(grouped, in_axes=(None, 1), chunk_size=1)
    both = lambda apply: quick_compile(value_and_gradients(apply), kernel, x)
    assert_trees_close(both(apply), both(loop_over_steps(grouped)), 1e-4, 1e-4)
    x, kernel = (jnp.round(4 * a).astype(jnp.int32) for a in arrays(ORDERS[0]))
    fun = convolution(ORDERS[0])
    apply = tdjax.time_distributed(fun, in_axes=(None, 1), chunk_size=2)
    assert (apply(kernel, x) == loop_over_steps(fun)(kernel, x)).all()


def test_a_checkpoint_of_the_users_around_a_convolution_stays():
    kernel = normal(1, 3, 3, 2, 4)
    convolve = lambda x: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    policy = jax.checkpoint_policies.nothing_saveable
    fun = jax.checkpoint(convolve, policy=policy, prevent_cse=False)
    apply = tdjax.time_distributed(fun, chunk_size=1)
    x = jax.ShapeDtypeStruct((2, 4, 6, 6, 2), jnp.float32)
    (scan,) = [e for e in jax.make_jaxpr(apply)(x).eqns if e.primitive.name == "scan"]
    names = ("remat2", "checkpoint")
    inside = scan.params["jaxpr"].jaxpr.eqns
    (choice,) = [eqn for eqn in inside if eqn.primitive.name == "cond"]
    blocks = [
        [eqn for eqn in branch.jaxpr.eqns if eqn.primitive.name in names]
        for branch in choice.params["branches"]
    ]
    assert [*map(len, blocks)] == [1, 1]
    for block in [*blocks[0], *blocks[1]]:
        assert block.params["policy"] is policy
        assert block.params["prevent_cse"] is False
        assert str(block.params["jaxpr"]).count("conv_general_dilated") == 1


def test_profiles_show_the_names_of_layers_in_compiled_loops():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Sequential([nn.Conv(4, (3, 3), name="edges"), nn.relu])
            return tdjax.linen.TimeDistributed(layer, chunk_size=1)(x)

    model, x = Model(), normal(0, 2, 4, 6, 6, 2)
    variables = model.init(jax.random.key(0), x)
    program = jax.jit(jax.grad(loss(model.apply))).lower(variables, x).compile()
    names = [
        n for n in re.findall(r'op_name="([^"]*)"', program.as_text()) if "edges" in n
    ]
    assert any("transpose" in name for name in names)
    assert any("conv_general_dilated" in name for name in names)
