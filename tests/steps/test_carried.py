"""State that goes from step to step: against a plain loop over steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdjax
from helpers import assert_trees_close, normal, slow_but, x64
from tdjax.linen import TimeDistributed

BATCH, STEPS = 3, 5
OPTIONS = [
    {},
    {"chunk_size": 1},
    {"chunk_size": 2},
    {"chunk_size": 2, "unroll": True},
    {"chunk_size": 2, "remat": True},
]


class Norm(nn.Module):
    """Its statistics do not reach its output."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,))(x)
        return nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.8)(x))


class Whitened(nn.Module):
    """Each step's output depends on the steps before; one result does not."""

    @nn.compact
    def __call__(self, x):
        seen = self.variable("batch_stats", "seen", lambda: jnp.ones(x.shape[-1]))
        count = self.variable("batch_stats", "count", lambda: jnp.zeros((), jnp.int32))
        last = self.variable("batch_stats", "last", lambda: jnp.zeros(x.shape[-1]))
        hidden = nn.Dense(4)(x)
        y = jnp.tanh(nn.Dense(4)(x) * seen.value[:4].sum())
        seen.value = 0.7 * seen.value + 0.3 * jnp.abs(x).mean((0, 1)) + last.value
        count.value = count.value + 1
        last.value = x[0, 0]
        return {"late": y, "early": hidden}


@pytest.fixture
def x():
    return normal(0, BATCH, STEPS, 6, 4)


def loop(layer, variables, x, valid=None):
    """The referee: one call a step, each with the state that the one before left."""
    state, results = {"batch_stats": variables["batch_stats"]}, []
    for t in range(x.shape[1]):
        y, after = layer.apply(variables | state, x[:, t], mutable=["batch_stats"])
        if valid is None or valid[t]:
            state = after
        results.append(y)
    return jax.tree.map(lambda *steps: jnp.stack(steps, 1), *results), state


@pytest.mark.parametrize("options", slow_but((0, 4), OPTIONS))
@pytest.mark.parametrize("layer", [Norm(), Whitened()])
def test_results_state_and_gradients_are_those_of_a_loop_over_steps(layer, options, x):
    wrapped = TimeDistributed(layer, variable_carry="batch_stats", **options)
    variables = wrapped.init(jax.random.key(0), x)

    def loss(run, params, x):
        y, state = run({**variables, "params": params}, x)
        total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y))
        return total, (y, state)

    run = lambda v, x: wrapped.apply(v, x, mutable=["batch_stats"])
    referee = lambda v, x: loop(layer, v, x)
    derive = lambda f: jax.jit(
        jax.value_and_grad(lambda *args: loss(f, *args), (0, 1), has_aux=True)
    )
    params = variables["params"]
    assert_trees_close(derive(run)(params, x), derive(referee)(params, x))


def test_only_what_depends_on_the_state_is_in_the_loop(x):
    wrapped = TimeDistributed(Norm(), variable_carry="batch_stats")
    variables = wrapped.init(jax.random.key(0), x)
    run = lambda v, x: wrapped.apply(v, x, mutable=["batch_stats"])
    program = jax.make_jaxpr(run)(variables, x)
    loops = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(loops) == 1
    inside = {eqn.primitive.name for eqn in loops[0].params["jaxpr"].jaxpr.eqns}
    assert inside <= {"mul", "add", "jit", "pjit"}


@pytest.mark.parametrize("mutable", [False, []])
def test_inference_has_no_loop(x, mutable):
    layer = nn.BatchNorm(use_running_average=True)
    wrapped = TimeDistributed(layer, variable_carry="batch_stats")
    variables = wrapped.init(jax.random.key(0), x)
    run = lambda v, x: wrapped.apply(v, x, mutable=mutable)
    assert "scan" not in str(jax.make_jaxpr(run)(variables, x))


def test_steps_without_a_valid_example_leave_the_state_alone(x):
    mask = jnp.asarray([[True, False, True, False, False]] * BATCH)
    wrapped = TimeDistributed(Norm(), variable_carry="batch_stats")
    variables = wrapped.init(jax.random.key(0), x)
    y, state = wrapped.apply(variables, x, mask=mask, mutable=["batch_stats"])
    wanted, wanted_state = loop(Norm(), variables, x, valid=mask[0])
    assert_trees_close(state, wanted_state)
    hidden = jnp.where(mask[:, :, None, None], wanted, 0)
    np.testing.assert_allclose(y, hidden, rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """A counter, and whatever else `change` makes of it."""

    change: str = "none"

    @nn.compact
    def __call__(self, x):
        count = self.variable("cache", "count", lambda: jnp.zeros((), jnp.float32))
        count.value = count.value + 1
        if self.change == "dtype":
            count.value = count.value.astype(jnp.bfloat16)
        return x, count.value


def test_state_that_depends_on_no_input_counts_the_steps(x):
    wrapped = TimeDistributed(Odd(), out_axes=(1, 0), variable_carry="cache")
    variables = {"cache": {"count": jnp.zeros(())}}
    (_, counts), state = wrapped.apply(variables, x, mutable=["cache"])
    np.testing.assert_array_equal(counts, jnp.arange(1, STEPS + 1))
    assert state["cache"]["count"] == STEPS


@pytest.mark.parametrize(
    ("layer", "out_axes", "variables", "message"),
    [
        (Odd(), (1, None), True, "out_axes=None is for a result that is the same"),
        (Odd("dtype"), (1, 0), True, r"keep its shape and dtype, got float32\[\]"),
        (Odd(), (1, 0), False, "must be there before the first step"),
    ],
)
def test_state_that_cannot_be_carried_is_refused(
    x, user_errors, layer, out_axes, variables, message
):
    wrapped = TimeDistributed(layer, out_axes=out_axes, variable_carry="cache")
    variables = {"cache": {"count": jnp.zeros(())}} if variables else {}
    with pytest.raises(ValueError, match=message):
        wrapped.apply(variables, x, mutable=["cache"])


@pytest.mark.filterwarnings("ignore:With mask=, the layer writes statistics")
def test_late_results_are_hidden_at_masked_steps(x):
    mask = tdjax.lengths_to_mask(jnp.asarray([5, 2, 0]), STEPS)
    wrapped = TimeDistributed(Whitened(), variable_carry="batch_stats")
    variables = wrapped.init(jax.random.key(0), x)
    y, _ = wrapped.apply(variables, x, mask=mask, mutable=["batch_stats"])
    assert not jnp.any(y["late"][~mask])
    assert jnp.all(jnp.any(y["late"][mask], -1))


def test_no_steps_leave_the_state_as_it_is(x):
    wrapped = TimeDistributed(Whitened(), variable_carry="batch_stats")
    variables = wrapped.init(jax.random.key(0), x)
    y, state = wrapped.apply(variables, x[:, :0], mutable=["batch_stats"])
    assert y["late"].shape == (BATCH, 0, 6, 4)
    assert_trees_close(state["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fold"}, "variable_carry='batch_stats' .* needs method='vmap'"),
        ({"capacity": 3}, "needs capacity=None, got 3"),
        ({"axis_name": "time"}, "needs axis_name=None, got 'time'"),
    ],
)
def test_options_that_have_no_order_of_steps_are_refused(user_errors, options, message):
    with pytest.raises(ValueError, match=message):
        TimeDistributed(nn.Dense(2), variable_carry="batch_stats", **options)


def test_float32_statistics_of_float64_inputs_become_float64_as_in_a_loop():
    with x64():
        x = normal(0, BATCH, STEPS, 4, dtype=jnp.float64)
        layer = nn.BatchNorm(use_running_average=False, momentum=0.9)
        wrapped = TimeDistributed(layer, variable_carry="batch_stats")
        variables = wrapped.init(jax.random.key(0), x)
        assert variables["batch_stats"]["mean"].dtype == jnp.float32
        got = wrapped.apply(variables, x, mutable=["batch_stats"])
        want = loop(layer, variables, x)
        assert got[1]["batch_stats"]["mean"].dtype == jnp.float64
        assert_trees_close(got, want, 1e-6, 1e-6)


def test_a_result_may_be_a_constant(x):
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.BatchNorm(use_running_average=False)(x)
            return jnp.zeros(()), 3.0

    wrapped = TimeDistributed(
        Constant(), out_axes=(0, None), variable_carry="batch_stats"
    )
    variables = wrapped.init(jax.random.key(0), x)
    (zeros, three), _ = wrapped.apply(variables, x, mutable=["batch_stats"])
    assert zeros.tolist() == [0.0] * STEPS
    assert float(three) == 3.0
