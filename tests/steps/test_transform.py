import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdjax
from helpers import (
    assert_trees_close,
    assert_trees_equal,
    integers,
    lowerings,
    normal,
    numpy_dense,
    quick_compile,
    slow_but,
)

T = 5


def loop_over_steps(fun, x, time=1, out_time=1):
    """The definition, in Python."""
    steps = [fun(jnp.take(x, t, axis=time)) for t in range(x.shape[time])]
    return jnp.stack(steps, out_time)


@pytest.fixture
def params():
    return {"kernel": integers(1, 3, 4), "bias": integers(2, 4)}


# Exactness


def test_every_lowering_of_dense_is_exact_on_integers_and_so_is_its_gradient(params):
    x, weights = integers(3, 2, T, 3), integers(4, 2, T, 4)

    def value_and_gradients(options):
        apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), **options)
        loss = lambda params, x: jnp.sum(weights * apply(params, x))
        return apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

    x64, w64 = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    want_y = numpy_dense(params, x)
    want_kernel = sum(
        np.outer(x64[b, t], w64[b, t]) for b in range(2) for t in range(T)
    )
    want_x = w64 @ np.asarray(params["kernel"], np.float64).T
    for options in lowerings(T):
        y, (grads, grad_x) = value_and_gradients(options)
        np.testing.assert_array_equal(y, want_y, err_msg=str(options))
        np.testing.assert_array_equal(grads["kernel"], want_kernel, str(options))
        np.testing.assert_array_equal(grads["bias"], w64.sum((0, 1)), str(options))
        np.testing.assert_array_equal(grad_x, want_x, str(options))


def compiled_program(fun, *args):
    """What the optimised program does: its operations, flops and bytes."""
    compiled = jax.jit(fun).lower(*args).compile()
    opcodes = re.findall(
        r"^ *(?:ROOT )?%?\S+ = \S+ ([a-z\-]+)\(", compiled.as_text(), re.M
    )
    cost = compiled.cost_analysis()
    return Counter(opcodes), cost["flops"], cost["bytes accessed"]


LAYOUTS = {"batch-major": ((8, 16, 32), 1), "time-major": ((16, 8, 32), 0)}
layouts = pytest.mark.parametrize(("shape", "time"), LAYOUTS.values(), ids=LAYOUTS)


def dense_programs(shape, time, method, gradient):
    """The optimised programs of `dense` and of `time_distributed(dense)`."""
    params, x = {"kernel": jnp.ones((32, 64)), "bias": jnp.ones(64)}, jnp.ones(shape)
    cotangent = jnp.ones((*shape[:2], 64))
    wrapped = tdjax.time_distributed(
        tdjax.dense, in_axes=(None, time), out_axes=time, method=method
    )
    for apply in (tdjax.dense, wrapped):
        pull_back = lambda p, x, ct, apply=apply: jax.vjp(apply, p, x)[1](ct)
        if gradient:
            yield compiled_program(pull_back, params, x, cotangent)
        else:
            yield compiled_program(apply, params, x)


@layouts
@pytest.mark.parametrize("method", ["vmap", "fold"])
def test_dense_and_time_distributed_dense_are_one_program(shape, time, method):
    plain, wrapped = dense_programs(shape, time, method, gradient=False)
    assert plain[0]["dot"] + plain[0]["custom-call"] > 0
    assert plain == wrapped


@layouts
def test_their_gradients_are_one_program_too(shape, time):
    plain, wrapped = dense_programs(shape, time, "vmap", gradient=True)
    assert plain == wrapped


@layouts
def test_fold_saves_the_copies_in_the_gradient_of_dense(shape, time):
    # XLA brings the kernel's gradient, a contraction over two axes, to a product of
    # matrices; on the CPU it copies the cotangent for that. Folded axes need no copy.
    plain, folded = dense_programs(shape, time, "fold", gradient=True)
    assert folded[0]["transpose"] == folded[0]["copy"] == 0
    assert folded[1] == plain[1]
    assert folded[2] <= plain[2]


def test_the_program_comparison_sees_a_transpose():
    params, x = (
        {"kernel": jnp.ones((32, 64)), "bias": jnp.ones(64)},
        jnp.ones((8, 16, 32)),
    )
    plain = compiled_program(tdjax.dense, params, x)
    transposed = lambda params, x: jnp.swapaxes(tdjax.dense(params, x), 0, 1)
    assert compiled_program(transposed, params, x) != plain


@pytest.mark.parametrize("time", [0, 1])
def test_fold_with_adjacent_axes_lowers_to_reshapes_only(time):
    apply = tdjax.time_distributed(jnp.sin, in_axes=time, out_axes=time, method="fold")
    jaxpr = jax.make_jaxpr(apply)(jnp.ones((4, 6, 3)))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["reshape", "sin", "reshape"]


def test_a_chunked_time_distributed_is_compiled_in_constant_size():
    apply = partial(tdjax.time_distributed, jnp.sin, chunk_size=4)
    programs = [str(jax.make_jaxpr(apply())(jnp.ones((2, t, 3)))) for t in (64, 4096)]
    count = [program.count(" sin ") for program in programs]
    assert count == [1, 1]


# Axes, pytrees, shared inputs


@st.composite
def shapes_and_axes(draw):
    rest = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    time = draw(st.integers(0, len(rest)))
    shape = (*rest[:time], draw(st.integers(0, 4)), *rest[time:])
    return shape, time, draw(st.integers(-len(shape), len(shape) - 1))


@pytest.mark.slow
@given(
    shapes_and_axes(),
    st.sampled_from(["vmap", "fold"]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["int32", "bfloat16", "float32"]),
)
def test_any_axis_any_shape_any_dtype(shape_and_axes, method, chunk_size, dtype):
    shape, time, out_time = shape_and_axes
    x = integers(0, *shape).astype(dtype)
    fun = lambda x: {"double": x + x, "negative": (-x, jnp.abs(x) > 1)}
    apply = tdjax.time_distributed(
        fun,
        in_axes=time - len(shape),
        out_axes=out_time,
        method=method,
        chunk_size=chunk_size,
    )
    want = jax.tree.map(lambda y: jnp.moveaxis(y, time, out_time), fun(x))
    got = apply(x)
    assert jax.tree.map(lambda y: y.dtype, got) == jax.tree.map(lambda y: y.dtype, want)
    assert_trees_equal(
        jax.tree.map(lambda y: y.astype(jnp.float32), got),
        jax.tree.map(lambda y: y.astype(jnp.float32), want),
    )


def test_pytrees_prefixes_shared_inputs_and_keywords():
    def fun(inputs, scale, *, offset, negate):
        y = inputs["a"] * scale["s"] + inputs["b"][..., None] + offset
        return {"y": -y if negate else y, "extra": (inputs["b"], scale["s"])}

    inputs = {"a": normal(0, T, 2, 3), "b": normal(1, 2, T)}
    scale, offset = {"s": normal(2, 3)}, normal(3, 3)
    a, b, s = inputs["a"], inputs["b"], scale["s"]
    want = -(jnp.swapaxes(a, 0, 1) * s + b[..., None] + offset)
    for options in lowerings(T):
        apply = tdjax.time_distributed(
            fun,
            in_axes=({"a": 0, "b": 1}, None),
            out_axes={"y": -1, "extra": (0, None)},
            **options,
        )
        got = apply(inputs, scale, offset=offset, negate=True)
        assert_trees_close(got, {"y": jnp.moveaxis(want, 1, -1), "extra": (b.T, s)})


def test_nested_calls_take_one_axis_each(params):
    x = integers(0, 2, 3, 4, 5, 3)
    inner = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), method="fold")
    outer = tdjax.time_distributed(inner, in_axes=(None, 1), chunk_size=2)
    apply = tdjax.time_distributed(outer, in_axes=(None, 1))
    np.testing.assert_array_equal(apply(params, x), numpy_dense(params, x))


def test_vmap_is_the_reference_also_where_the_batch_is_mixed():
    fun = lambda x: x - x.mean(0)
    x = normal(0, 4, T, 3)
    want = loop_over_steps(fun, x)
    for options in lowerings(T, methods=("vmap",)):
        np.testing.assert_allclose(
            tdjax.time_distributed(fun, **options)(x), want, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("options", [*lowerings(0), {"chunk_size": 2, "unroll": True}])
@pytest.mark.parametrize("shape", slow_but((0,), [(2, 0, 3), (0, 4, 3), (0, 0, 3)]))
def test_no_steps_and_no_examples_give_empty_results(params, options, shape):
    if options["chunk_size"] == 0:
        options = {**options, "chunk_size": 1}
    apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), **options)
    assert apply(params, jnp.ones(shape)).shape == (*shape[:2], 4)


def test_fold_takes_functions_that_vmap_cannot_map():
    def fun(x):
        return jax.pure_callback(lambda x: 2 * np.asarray(x), x, x)

    x = normal(0, 2, T, 3)
    for chunk_size in (None, 2):
        apply = tdjax.time_distributed(fun, method="fold", chunk_size=chunk_size)
        np.testing.assert_allclose(apply(x), 2 * x)


@pytest.mark.parametrize(
    ("timesteps", "unroll", "barriers"),
    [(8, 1, False), (8, 2, False), (8, 4, True), (6, 2, True), (3, 1, True)],
)
def test_remat_keeps_its_barriers_where_blocks_are_straight_line_code(
    timesteps, unroll, barriers
):
    options = {"chunk_size": 2, "remat": True, "unroll": unroll}
    apply = tdjax.time_distributed(jnp.sin, **options)
    jaxpr = jax.make_jaxpr(apply)(jnp.ones((2, timesteps, 3)))
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    (block,) = scan.params["jaxpr"].jaxpr.eqns
    assert block.params["prevent_cse"] == barriers


def test_axis_name_lets_fun_see_all_steps():
    x = normal(0, 2, T, 3)
    fun = lambda x: x - jax.lax.pmean(x, "time")
    got = tdjax.time_distributed(fun, axis_name="time")(x)
    np.testing.assert_allclose(got, x - x.mean(1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_numpy_arrays_go_in(params):
    x = np.ones((2, T, 3), np.float32)
    for options in lowerings(T):
        apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), **options)
        assert isinstance(apply(params, x), jax.Array)


# Composition


@pytest.fixture(params=lowerings(T)[::3], ids=str)
def apply(request):
    wrapped = tdjax.time_distributed(_layer, in_axes=(None, 1), **request.param)
    return wrapped


def _layer(params, x):
    return jnp.tanh(tdjax.dense(params, x))


def test_jit_grad_vmap_scan_and_checkpoint(apply, params):
    xs = normal(0, 3, 2, T, 3)
    want = jnp.tanh(numpy_dense(params, xs))
    run = partial(apply, params)

    def everything(xs):
        _, scanned = jax.lax.scan(lambda _, x: (None, run(x)), None, xs)
        gradient = jax.grad(lambda x: jax.checkpoint(run)(x).sum())(xs[0])
        tangent = jax.jvp(run, (xs[0],), (jnp.ones_like(xs[0]),))[1]
        return jax.vmap(run)(xs), scanned, gradient, tangent

    mapped, scanned, gradient, tangent = quick_compile(everything, xs)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-6)
    slope = 1 - want[0] ** 2
    np.testing.assert_allclose(
        gradient, slope @ params["kernel"].T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(tangent, slope * params["kernel"].sum(0), 1e-4, 1e-4)


def test_a_second_call_of_the_same_shapes_traces_nothing(params):
    traces = []

    def fun(x):
        traces.append(x.shape)
        return tdjax.dense(params, x)

    for options in lowerings(T):
        run = jax.jit(tdjax.time_distributed(fun, **options))
        run(integers(0, 2, T, 3))
        first = len(traces)
        run(integers(1, 2, T, 3))
        assert len(traces) == first, options


def test_no_tracer_leaks(params):
    with jax.checking_leaks():
        for options in lowerings(T)[::2]:
            apply = tdjax.time_distributed(_layer, in_axes=(None, 1), **options)
            jax.jit(jax.grad(lambda p, x, f=apply: f(p, x).sum()))(
                params, jnp.ones((2, T, 3))
            )


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, "b, t"),
        ({"method": "fold"}, "b, t"),
        ({"chunk_size": 2}, "b, t"),
        ({"chunk_size": 2, "method": "fold", "remat": True}, "b, t"),
        ({"chunk_size": 2, "method": "fold"}, "b, 2*t"),
        pytest.param({"remat": True}, "b, t", marks=pytest.mark.slow),
        pytest.param({"chunk_size": 1}, "b, t", marks=pytest.mark.slow),
        pytest.param(
            {"chunk_size": 2, "remat": True}, "b, 2*t", marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_export_with_symbolic_batch_and_time(params, options, sizes):
    from jax import export

    apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), **options)
    batch, time = export.symbolic_shape(sizes, constraints=["t >= 2"])
    x = jax.ShapeDtypeStruct((batch, time, 3), jnp.float32)
    exported = export.export(jax.jit(apply))(params, x)
    (result,) = exported.out_avals
    assert result.shape == (batch, time, 4)
    gradient = jax.jit(jax.grad(lambda params, x: apply(params, x).sum()))
    exported_gradient = export.export(gradient)(params, x)
    for timesteps in (4, 5, 6) if sizes == "b, t" else (4, 6):
        x = integers(0, 3, timesteps, 3)
        np.testing.assert_array_equal(exported.call(params, x), numpy_dense(params, x))
        kernel = exported_gradient.call(params, x)["kernel"]
        np.testing.assert_array_equal(kernel, x.sum((0, 1))[:, None].repeat(4, 1))


def test_time_can_be_sharded():
    script = """
import jax, jax.numpy as jnp, numpy as np, tdjax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("time",))
x = jax.device_put(jnp.arange(48.0).reshape(2, 8, 3), NamedSharding(mesh, P(None, "time")))
def fun(x):
    return jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P(None)))
y = jax.jit(tdjax.time_distributed(fun, spmd_axis_name="time"))(x)
assert y.sharding.spec == P(None, "time"), y.sharding
np.testing.assert_array_equal(y, 2 * np.arange(48.0).reshape(2, 8, 3))
shard_map = getattr(jax, "shard_map", None)
if shard_map is not None:
    for options in ({}, {"method": "fold"}, {"chunk_size": 2}):
        local = tdjax.time_distributed(jnp.sin, **options)
        specs = P(None, "time")
        z = jax.jit(shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))(x)
        np.testing.assert_allclose(z, np.sin(x), rtol=1e-5, atol=1e-5)
"""
    import os
    import subprocess
    import sys

    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Errors

ONES = jnp.ones((2, T, 3))
td = tdjax.time_distributed


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: td(3), TypeError, r"fun must be callable, got int"),
        (
            lambda: td(abs, method="loop"),
            ValueError,
            r"method must be one of .* 'loop'",
        ),
        (
            lambda: td(abs, chunk_size=0),
            ValueError,
            r"chunk_size must be a positive int, got 0",
        ),
        (lambda: td(abs, chunk_size=2.0), TypeError, r"chunk_size .* got float"),
        (
            lambda: td(abs, unroll=0),
            ValueError,
            r"unroll must be a positive int, got 0",
        ),
        (lambda: td(abs, unroll="all"), TypeError, r"unroll .* got str"),
        (lambda: td(abs, remat=1), TypeError, r"remat must be a bool, got int"),
        (
            lambda: td(abs, axis_name="t", chunk_size=2),
            ValueError,
            r"axis_name='t' .* chunk_size=2 must then be None",
        ),
        (
            lambda: td(abs, axis_name="t", method="fold"),
            ValueError,
            r"axis_name='t' .* needs method='vmap', got method='fold'",
        ),
        (
            lambda: td(abs, spmd_axis_name="t", method="fold"),
            ValueError,
            r"spmd_axis_name='t' .* needs method='vmap'",
        ),
        (
            lambda: td(abs)(jnp.ones(3)),
            ValueError,
            r"args\[0\] is mapped over axis 1 and must have that axis, got float32\[3\]",
        ),
        (
            lambda: td(abs)({"a": [1.0]}),
            TypeError,
            r"args\[0\]\['a'\]\[0\] is mapped over axis 1 and must be an array, got float",
        ),
        (
            lambda: td(jnp.add)(ONES, jnp.ones((2, 6, 3))),
            ValueError,
            r"args\[0\] float32\[2,5,3\] has 5 on axis 1; args\[1\] float32\[2,6,3\] has 6",
        ),
        (
            lambda: td(jnp.add, in_axes=(1,))(ONES, ONES),
            ValueError,
            r"in_axes must have an entry for each positional argument: got \(1,\) for 2",
        ),
        (
            lambda: td(abs, in_axes=({"a": 1},))(ONES),
            ValueError,
            r"in_axes must be an int, None, or a pytree prefix of the positional",
        ),
        (
            lambda: td(abs, in_axes="1")(ONES),
            TypeError,
            r"in_axes must hold ints .* str",
        ),
        (
            lambda: td(abs, in_axes=None)(ONES),
            ValueError,
            r"in_axes must give at least one",
        ),
        (
            lambda: td(abs)(x=ONES),
            ValueError,
            r"in_axes must give at least one positional .* Keyword arguments are shared",
        ),
        (lambda: td(abs)({}), ValueError, r"in_axes must give at least one array"),
        (
            lambda: td(abs)([[1.0, 2.0]]),
            TypeError,
            r"args\[0\]\[0\]\[0\] .* lists of them with jnp.asarray",
        ),
        (
            lambda: td(abs, out_axes=(1, 1))(ONES),
            ValueError,
            r"out_axes must be an int, None, or a pytree prefix of the results",
        ),
        (
            lambda: td(abs, out_axes=4)(ONES),
            ValueError,
            r"out_axes must lie within the result's 3 axes .* got 4",
        ),
        (lambda: td(abs, out_axes=None, chunk_size=1)(ONES), ValueError, r"out_axes"),
        (lambda: td(abs, out_axes=None, method="fold")(ONES), ValueError, r"out_axes"),
        (
            lambda: td(abs, method="fold", in_axes=0)(jnp.ones(T)),
            ValueError,
            r"method='fold' needs a batch axis .* got float32\[5\] with time on axis 0",
        ),
        (
            lambda: td(jnp.add, method="fold")(ONES, jnp.ones((1, T, 3))),
            ValueError,
            r"method='fold' needs one batch size .* float32\[2,5,3\] .* float32\[1,5,3\]",
        ),
        (
            lambda: td(lambda x: x.sum(0), method="fold")(ONES),
            ValueError,
            r"method='fold' needs results with the batch on axis 0: .* 2 \* 5 = 10 .* "
            r"float32\[3\]",
        ),
        (
            lambda: td(lambda x: x.T, method="fold")(jnp.ones((2, T, 10))),
            ValueError,
            r"the shape that the steps stacked have, float32\[10,5,2\]: .* float32\[2,5,10\]",
        ),
        (
            lambda: td(
                lambda x: jnp.zeros(len(x)), method="fold", chunk_size=2, out_axes=None
            )(ONES),
            ValueError,
            r"the shape that the steps stacked have, float32\[2\]: .* float32\[4\]",
        ),
    ],
)
def test_bad_input_names_the_argument_and_the_shapes(user_errors, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_fold_explains_a_shared_input_with_a_batch_axis(user_errors):
    apply = td(jnp.add, in_axes=(1, None), method="fold")
    with pytest.raises(TypeError) as caught:
        apply(ONES, jnp.ones((2, 3)))
    assert "shared argument has a batch axis" in "".join(caught.value.__notes__)


def test_unroll_needs_a_known_number_of_steps(user_errors):
    from jax import export

    batch, time = export.symbolic_shape("b, t", constraints=["t >= 2"])
    x = jax.ShapeDtypeStruct((batch, time, 3), jnp.float32)
    for unroll in (True, 2):
        with pytest.raises(
            ValueError, match=rf"unroll={unroll} needs a known .* size t"
        ):
            export.export(jax.jit(td(jnp.sin, chunk_size=1, unroll=unroll)))(x)


def test_options_can_be_given_to_the_decorator():
    @tdjax.time_distributed(in_axes=0, out_axes=-1, chunk_size=2)
    def double(x):
        """Doubles."""
        return 2 * x

    x = normal(0, T, 2, 3)
    np.testing.assert_array_equal(double(x), jnp.moveaxis(2 * x, 0, -1))
    assert (double.__name__, double.__doc__) == ("double", "Doubles.")


def test_a_decorator_checks_its_options_and_its_function(user_errors):
    with pytest.raises(ValueError, match="method must be one of"):
        tdjax.time_distributed(method="none")
    with pytest.raises(TypeError, match="fun must be callable, got float32"):
        tdjax.time_distributed(in_axes=0)(ONES)


def test_fold_refuses_what_mixes_examples_whatever_its_shape(user_errors):
    pairs = lambda x: jnp.einsum("bd,cd->bc", x, x)
    for fun in (
        lambda x: jnp.concatenate([x, pairs(x)], -1),
        lambda x: pairs(x)[:, ::2],
        lambda x: jnp.repeat(pairs(x), 3, 1),
    ):
        with pytest.raises(
            ValueError, match="needs results of the shape that the steps"
        ):
            td(fun, method="fold")(jnp.ones((4, 6, 3)))


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 1),
        ({"method": "fold"}, 1),
        ({"chunk_size": 2, "unroll": True}, 3),
        ({"chunk_size": 2}, 1),  # The tail; the other two blocks are in a loop.
    ],
)
def test_remat_outside_of_loops_keeps_its_barriers(options, blocks):
    apply = td(lambda x: jnp.sin(jnp.sin(x)), remat=True, **options)
    x = jnp.ones((2, 5, 3))
    names = ("remat2", "checkpoint")
    eqns = [e for e in jax.make_jaxpr(apply)(x).eqns if e.primitive.name in names]
    assert [eqn.params["prevent_cse"] for eqn in eqns] == [True] * blocks
    gradient = jax.jit(jax.grad(lambda x: apply(x).sum())).lower(x).as_text()
    assert gradient.count("optimization_barrier") >= blocks


def test_a_shared_result_of_symbolic_steps_in_chunks_is_exported():
    from jax import export

    apply = td(lambda x: (x * 2, jnp.arange(3)), out_axes=(1, None), chunk_size=2)
    batch, time = export.symbolic_shape("b, t", constraints=["t >= 2"])
    exported = export.export(jax.jit(apply))(
        jax.ShapeDtypeStruct((batch, time, 3), jnp.float32)
    )
    for steps in (4, 5):
        x = normal(0, 2, steps, 3)
        y, shared = exported.call(x)
        np.testing.assert_array_equal(y, 2 * x)
        assert shared.tolist() == [0, 1, 2]
