import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdjax
import zoo
from helpers import assert_trees_close, assert_trees_equal, normal, slow_but
from tdjax.nnx import FlattenDense, PerStepDense, TimeDistributed
from test_linen import METHODS, dropped, methods, some_methods

B, T = 3, 4


@pytest.fixture
def x():
    return normal(0, B, T, 5)


class Model(nnx.Module):
    """Layers of every sort of state, each wrapped, if `wrap` wraps."""

    def __init__(self, wrap, rngs):
        self.hidden = wrap(nnx.Linear(5, 4, rngs=rngs))
        self.norm = wrap(nnx.BatchNorm(4, momentum=0.9, rngs=rngs))
        self.dropout = wrap(nnx.Dropout(0.5, rngs=rngs))
        self.head = wrap(nnx.Linear(4, 2, rngs=rngs))

    def __call__(self, x):
        return self.head(self.dropout(self.norm(self.hidden(x))))


def wrapped_model(**options):
    return Model(lambda layer: TimeDistributed(layer, **options), nnx.Rngs(0))


def values(module, kind=nnx.Variable):
    """Arrays by path, without the wrappers' `layer`."""
    flat = jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(module, kind))
    )
    name = lambda path: jax.tree_util.keystr(path).replace("['layer']", "")
    return {name(path): leaf for path, leaf in flat}


@some_methods
@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_layers_parameters_stay_as_they_are(name, options):
    kind = zoo.ZOO[name]
    layer = kind.nnx(nnx.Rngs(0))
    model = TimeDistributed(layer, in_axes=kind.in_axes, **options)

    @nnx.jit
    def call(model, inputs):
        model(*inputs, **kind.kwargs)

    call(model, kind.inputs)
    assert model.layer is layer
    want = values(kind.nnx(nnx.Rngs(0)), nnx.Param)
    assert_trees_equal(values(model, nnx.Param), want)


# State


def batch_norm(**kwargs):
    return nnx.BatchNorm(5, momentum=0.9, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_batch_norm_under_vmap_normalises_each_step_at_every_call(x, chunk_size):
    model = TimeDistributed(batch_norm(), chunk_size=chunk_size)
    for _ in range(3):
        steps = [nnx.clone(model.layer) for _ in range(T)]
        want = jnp.stack([layer(x[:, t]) for t, layer in enumerate(steps)], 1)
        np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)
        stats = [values(layer, nnx.BatchStat) for layer in steps]
        mean = jax.tree.map(lambda *each: sum(each) / T, *stats)
        assert_trees_close(values(model, nnx.BatchStat), mean)


def test_batch_norm_under_fold_normalises_batch_and_time_together(x):
    model, plain = TimeDistributed(batch_norm(), method="fold"), batch_norm()
    for _ in range(2):
        want = plain(x)  # over all axes but the last
        np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)
        assert_trees_close(values(model), values(plain))


def test_batch_norm_with_an_axis_name_normalises_all_steps_under_vmap(x):
    model = TimeDistributed(batch_norm(axis_name="time"), axis_name="time")
    np.testing.assert_allclose(model(x), batch_norm()(x), rtol=1e-4, atol=1e-4)


def test_counters_are_the_last_steps(x):
    class Counting(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.count[...] = self.count[...] + 1
            return x

    for options in METHODS:
        model = TimeDistributed(Counting(), **options)
        model(x), model(x)
        assert model.layer.count[...] == 2


@methods
def test_state_that_is_not_written_is_neither_changed_nor_copied(x, options):
    class Masked(nnx.Module):
        def __init__(self):
            self.mask = nnx.Variable(jnp.full((5, 61), -jnp.inf))

        def __call__(self, x):
            return x @ self.mask[...]

    model = TimeDistributed(Masked(), **options)
    before = model.layer.mask[...]
    program = str(jax.make_jaxpr(lambda x: model(x))(x))
    model(x)
    np.testing.assert_array_equal(model.layer.mask[...], before)
    assert "5,61]" in program
    for steps in (1, 3, T):
        assert f"{steps},5,61]" not in program


@methods
def test_evaluation_works_inside_jit_and_grad_of_jax(x, options):
    model = Model(lambda layer: TimeDistributed(layer, **options), nnx.Rngs(0))
    model(x)
    model.eval()
    want = model(x)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), want, 1e-5, 1e-5)
    assert jax.grad(lambda x: model(x).sum())(x).shape == x.shape


# Randomness


@methods
def test_each_step_draws_its_own_noise(options):
    model = TimeDistributed(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), **options)
    ones = jnp.ones((8, 6, 32))
    drops, again = dropped(model(ones)), dropped(model(ones))
    assert 0.4 < drops.mean() < 0.6
    assert (drops != again).any()
    for t in range(1, 6):
        assert (drops[:, t] != drops[:, 0]).any()


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_share_rng_gives_all_steps_the_same_noise(chunk_size):
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = TimeDistributed(layer, share_rng=True, chunk_size=chunk_size)
    drops = dropped(model(jnp.ones((8, 6, 32))))
    assert 0.4 < drops.mean() < 0.6
    assert (drops == drops[:, :1]).all()


def test_noise_does_not_depend_on_the_chunk_size():
    ones = jnp.ones((8, 6, 32))
    noise = [
        TimeDistributed(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), chunk_size=chunk_size)(ones)
        for chunk_size in (None, 1, 4)
    ]
    np.testing.assert_array_equal(noise[0], noise[1])
    np.testing.assert_array_equal(noise[0], noise[2])


# NNX's own tools


@methods
def test_train_eval_jit_grad_and_optax(x, options):
    model = wrapped_model(**options)
    optimiser, traces = optax.adam(1e-2), []

    @nnx.jit
    def train_step(model, state, x, y):
        traces.append(x.shape)
        loss = lambda model: jnp.mean((model(x) - y) ** 2)
        value, grads = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        updates, state = optimiser.update(grads, state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return value, state

    targets = normal(1, B, T, 2)
    state, losses = optimiser.init(nnx.state(model, nnx.Param)), []
    for _ in range(30):
        value, state = train_step(model, state, x, targets)
        losses.append(float(value))
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    model.eval()
    first = model(x)
    np.testing.assert_array_equal(model(x), first)
    plain = Model(lambda layer: layer, nnx.Rngs(0))
    nnx.update(plain, _unwrapped(model))
    plain.eval()
    np.testing.assert_allclose(plain(x), first, rtol=1e-4, atol=1e-5)


def _unwrapped(model):
    """The state of a wrapped model, as that of the model without wrappers."""
    plain = Model(lambda layer: layer, nnx.Rngs(0))
    for name in ("hidden", "norm", "dropout", "head"):
        setattr(plain, name, getattr(model, name).layer)
    return nnx.state(plain)


def test_gradients_are_those_of_the_plain_layer(x):
    plain = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
    loss = lambda model: jnp.sum(jnp.sin(model(x)))
    want = jax.tree.leaves(nnx.grad(loss)(plain))
    for options in METHODS:
        wrapped = TimeDistributed(nnx.Linear(5, 2, rngs=nnx.Rngs(0)), **options)
        assert_trees_close(jax.tree.leaves(nnx.grad(loss)(wrapped)), want, 1e-4, 1e-4)


def test_tabulate_shows_the_layer_and_its_parameters(x):
    table = nnx.tabulate(wrapped_model(), x, console_kwargs={"width": 200})
    assert "TimeDistributed" in table
    assert "norm/layer" in table


def test_orbax_saves_and_restores(x, tmp_path):
    import orbax.checkpoint as ocp

    model = wrapped_model()
    model(x)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", state)
    assert_trees_equal(restored, state)


@pytest.mark.slow
def test_no_tracer_leaks(x):
    for options in METHODS:
        graphdef, state = nnx.split(wrapped_model(**options))

        def run(state, x, graphdef=graphdef):
            model = nnx.merge(graphdef, state)
            return model(x), nnx.state(model)

        with jax.checking_leaks():
            jax.jit(run)(state, x)


# Inputs


def test_several_inputs_and_time_major_axes():
    class Scale(nnx.Module):
        def __call__(self, inputs, scale, *, negate):
            y = inputs["a"] * inputs["b"] * scale
            return {"y": -y if negate else y, "scale": scale}

    inputs = {"a": normal(1, T, B, 5), "b": normal(2, B, T, 5)}
    scale = normal(3, 5)
    for options in METHODS:
        model = TimeDistributed(
            Scale(),
            in_axes=({"a": 0, "b": 1}, None),
            out_axes={"y": 2, "scale": None},
            **options,
        )
        got = model(inputs, scale, negate=True)
        y = -(jnp.swapaxes(inputs["a"], 0, 1) * inputs["b"] * scale)
        assert_trees_close(got, {"y": jnp.moveaxis(y, 1, 2), "scale": scale})


def test_nested_over_documents_and_sentences():
    documents = normal(1, 2, 3, 4, 5, 3)
    encoder = zoo.NnxEncoder(nnx.Rngs(0))
    nested = TimeDistributed(TimeDistributed(encoder, method="fold"), chunk_size=2)
    want = encoder(documents.reshape(-1, 5, 3)).reshape(2, 3, 4, 4)
    np.testing.assert_allclose(nested(documents), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nested(documents), want, rtol=1e-4, atol=1e-5)


# The Dense family


@pytest.mark.parametrize("use_bias", [True, False])
def test_flatten_dense_and_per_step_dense_are_the_core_functions(x, use_bias):
    for layer, apply in (
        (FlattenDense, tdjax.flatten_dense),
        (PerStepDense, tdjax.per_step_dense),
    ):
        model = layer(T, 5, 2, use_bias=use_bias, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model))
        assert ("bias" in params) == use_bias
        np.testing.assert_array_equal(model(x), apply(params, x))


@pytest.mark.parametrize("layer", [FlattenDense, PerStepDense])
def test_dtype_and_param_dtype_are_as_in_flax(x, layer):
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.float16}
    model = layer(T, 5, 2, rngs=nnx.Rngs(0), **dtypes)
    assert model(x).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {
        jnp.dtype("float16")
    }


@pytest.mark.parametrize("layer", [FlattenDense, PerStepDense])
@pytest.mark.parametrize("use_bias", [True, False])
def test_attributes_are_named_as_those_of_nnx_linear(layer, use_bias):
    options = {"in_features": 5, "out_features": 2, "use_bias": use_bias}
    model = layer(T, rngs=nnx.Rngs(0), **options)
    linear = nnx.Linear(rngs=nnx.Rngs(0), **options)
    for name in ("in_features", "out_features", "use_bias", "dtype", "param_dtype"):
        assert getattr(model, name) == getattr(linear, name)
    assert (model.bias is None) == (linear.bias is None)


# Errors


@pytest.mark.parametrize("layer", [FlattenDense, PerStepDense])
def test_pythons_errors_about_arguments_name_no_private_class(layer):
    # They show this name; the call itself is wrapped by the test run's type checks.
    assert "_" not in layer.__init__.__qualname__.replace("__init__", "")


class Calls(nnx.Module):
    """Counts its calls outside of any variable."""

    def __init__(self, depth=1):
        self.count = 0
        self.inner = Calls(depth - 1) if depth else None

    def __call__(self, x):
        if self.inner is not None:
            return self.inner(x)
        self.count += 1
        return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: TimeDistributed(nnx.relu),
            TypeError,
            "layer must be an instance of flax.nnx.Module",
        ),
        (
            lambda x: TimeDistributed(batch_norm(), method="loop"),
            ValueError,
            "method must be one of",
        ),
        (
            lambda x: TimeDistributed(
                nnx.Dropout(0.5, rngs=nnx.Rngs(0)), share_rng=True, method="fold"
            )(x),
            ValueError,
            "share_rng=True needs method='vmap'",
        ),
        (
            lambda x: TimeDistributed(batch_norm())(x[0, 0]),
            ValueError,
            r"args\[0\] is mapped over axis 1 .* got float32\[5\]",
        ),
        (
            lambda x: PerStepDense(T, 5, 2, rngs=nnx.Rngs(0))(x[:, 1:]),
            ValueError,
            r"x must have timesteps = 4 on axis -2 and .* got float32\[3,3,5\]",
        ),
        (
            lambda x: FlattenDense(T, 5, 2, rngs=nnx.Rngs(0))(x.reshape(3, 2, 10)),
            ValueError,
            r"timesteps = 4 on axis -2 and in_features = 5 .* got float32\[3,2,10\]",
        ),
        (
            lambda x: FlattenDense(T, 5, 0, rngs=nnx.Rngs(0)),
            ValueError,
            "out_features must be a positive int, got 0",
        ),
        (
            lambda x: TimeDistributed(nnx.Dropout(0.5))(x, rngs=nnx.Rngs(0)),
            TypeError,
            "rngs must hold arrays, got an nnx.Rngs .* when it is made",
        ),
        (
            lambda x: TimeDistributed(nnx.Dropout(0.5), in_axes=(1, None))(
                x, {"noise": nnx.Rngs(0).params}
            ),
            TypeError,
            r"args\[1\] must hold arrays, got an nnx.Rngs",
        ),
        (
            lambda x: TimeDistributed(Calls())(x),
            TypeError,
            "in an nnx.Variable, got the attribute 'inner.count' set from 0 to 1",
        ),
        (
            lambda x: tdjax.time_distributed(batch_norm()),
            TypeError,
            "fun must be a function of arrays, got BatchNorm .* tdjax.nnx.TimeDistributed",
        ),
    ],
)
def test_bad_input_names_the_argument(user_errors, x, call, error, message):
    with pytest.raises(error, match=message):
        call(x)


# State from step to step, and other methods


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.calls = nnx.Intermediate(jnp.zeros((), int))

    def encode(self, x):
        return self.norm(x)

    def __call__(self, x):
        self.calls[...] += 1
        return self.encode(x)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("call", ["__call__", "encode"])
def test_statistics_can_go_from_step_to_step(x, chunk_size, call):
    options = {"chunk_size": chunk_size, "variable_carry": [nnx.BatchStat]}
    model, layer = (
        TimeDistributed(Encoder(nnx.Rngs(0)), **options),
        Encoder(nnx.Rngs(0)),
    )
    for run in (
        lambda m, x: getattr(m, call)(x),
        nnx.jit(lambda m, x: getattr(m, call)(x)),
    ):
        steps = [getattr(layer, call)(x[:, t]) for t in range(T)]
        np.testing.assert_allclose(
            run(model, x), jnp.stack(steps, 1), rtol=1e-4, atol=1e-5
        )
        assert_trees_close(values(model, nnx.BatchStat), values(layer, nnx.BatchStat))


def test_filters_that_carry_nothing_and_unordered_options_are_refused(user_errors):
    layer = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    for carry in ("batch_stats", True, None, 3):
        with pytest.raises(
            TypeError, match=r"variable_carry must be False or a filter"
        ):
            TimeDistributed(layer, variable_carry=carry)
    with pytest.raises(ValueError, match="needs method='vmap', got 'fold'"):
        TimeDistributed(layer, variable_carry=nnx.BatchStat, method="fold")


@methods
def test_other_methods_of_an_nnx_layer_run_over_time_too(x, options):
    model = TimeDistributed(Encoder(nnx.Rngs(0)), **options)
    model.eval()
    want = model.layer.encode(x)
    np.testing.assert_allclose(model.encode(x), want, rtol=1e-5, atol=1e-6)
    assert model.layer.calls[...] == 0
    mask = jnp.ones((B, T), bool).at[0, 1].set(False)
    assert not model.encode(x, mask=mask)[0, 1].any()
    with pytest.raises(
        AttributeError, match="TimeDistributed has no attribute 'decode'"
    ):
        model.decode(x)


class MaskedNorm(nnx.Module):
    """BatchNorm that gets the mask of its step."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.norm(2 * x, mask=mask[:, None])


@pytest.mark.parametrize("spare", [0, 3])
def test_packed_statistics_are_those_of_the_valid_steps(spare):
    mask = tdjax.lengths_to_mask(jnp.array([4, 0, 2]), 5)
    x = jnp.where(mask[..., None], normal(0, 3, 5, 3), jnp.nan)
    layer = MaskedNorm()
    capacity = int(mask.sum()) + spare
    model = tdjax.nnx.TimeDistributed(layer, method="fold", capacity=capacity)
    y = nnx.jit(lambda model, x, mask: model(x, mask, mask=mask))(model, x, mask)
    valid = 2 * np.asarray(x)[np.asarray(mask)].astype(np.float64)
    mean, var = valid.mean(0), valid.var(0)
    np.testing.assert_allclose(layer.norm.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.norm.var[...], 0.9 + 0.1 * var, rtol=1e-5)
    expected = (valid - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y[mask], expected, rtol=1e-4, atol=1e-5)
    assert not y[~mask].any()


@pytest.mark.parametrize(
    "options", [{}, {"method": "vmap"}, {"method": "fold", "chunk_size": 2}]
)
def test_packed_statistics_of_parts_of_the_batch_are_refused(options):
    mask = tdjax.lengths_to_mask(jnp.array([4, 2]), 5)
    model = tdjax.nnx.TimeDistributed(MaskedNorm(), capacity=6, **options)
    with pytest.raises(ValueError, match=r"take method='fold' without chunk_size"):
        model(jnp.ones((2, 5, 3)), mask, mask=mask)


class NormOfMore(nnx.Module):
    """BatchNorm that gets something of the mask's shape, and no mask."""

    def __init__(self):
        self.embed = nnx.Embed(7, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, more=None):
        x = self.embed(x) if x.ndim == 1 else x
        return self.norm(x if more is None else jnp.where(more[:, None], x, 2 * x))


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["floats", "ids", "flags"])
def test_packed_statistics_without_the_mask_are_refused(kind, jit):
    mask = tdjax.lengths_to_mask(jnp.array([4, 2]), 5)
    args = {
        "floats": (jnp.ones((2, 5, 3)),),
        "ids": (jnp.ones((2, 5), int),),
        "flags": (jnp.ones((2, 5, 3)), jnp.arange(10).reshape(2, 5) % 3 == 0),
    }[kind]
    model = tdjax.nnx.TimeDistributed(NormOfMore(), method="fold", capacity=6)
    with pytest.raises(ValueError, match="takes the mask of its step as an input"):
        jit(lambda model, mask, *args: model(*args, mask=mask))(model, mask, *args)


def test_statistics_of_an_overfull_batch_are_those_of_the_first_steps():
    mask = tdjax.lengths_to_mask(jnp.array([4, 2]), 5)
    x, layer = normal(0, 2, 5, 3), MaskedNorm()
    model = tdjax.nnx.TimeDistributed(layer, method="fold", capacity=5)
    y = nnx.jit(lambda model, x, mask: model(x, mask, mask=mask))(model, x, mask)
    assert jnp.isnan(y[1, 1]).all()
    first = 2 * np.asarray(x)[np.asarray(mask)][:5]
    np.testing.assert_allclose(layer.norm.mean[...], 0.1 * first.mean(0), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 3},
        {"method": "fold", "chunk_size": 3},
        {"method": "fold", "chunk_size": 3, "unroll": True},
        {"variable_carry": nnx.BatchStat},
        {"method": "fold"},
        {"method": "fold", "capacity": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", slow_but((0,), [[2, 1], [0, 0]]), ids=str)
def test_steps_without_a_valid_example_give_a_layer_with_the_mask_no_nan(
    lengths, options
):
    mask = tdjax.lengths_to_mask(jnp.array(lengths), 7)
    x = jnp.where(mask[..., None], normal(0, 2, 7, 3), jnp.nan)
    layer = MaskedNorm()
    model = tdjax.nnx.TimeDistributed(layer, **options)
    loss = lambda model, x: jnp.sum(model(x, mask, mask=mask) ** 3)
    gradients = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, x)
    for leaf in jax.tree.leaves((gradients, nnx.state(model, nnx.BatchStat))):
        assert jnp.isfinite(leaf).all()
    if not any(lengths):
        assert not layer.norm.mean[...].any()
