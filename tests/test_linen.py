import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.errors import CallCompactUnboundModuleError

import tdjax
import zoo
from helpers import (
    assert_trees_close,
    assert_trees_equal,
    lowerings,
    normal,
    slow_but,
)
from tdjax.linen import FlattenDense, PerStepDense, TimeDistributed

B, T = 3, 4
METHODS = [
    {"method": "vmap"},
    {"method": "fold"},
    {"method": "vmap", "chunk_size": 3},
    {"method": "fold", "chunk_size": 3, "unroll": True, "remat": True},
]
methods = pytest.mark.parametrize("options", slow_but((1, 2), METHODS), ids=str)
# Of many layers, each method once.
some_methods = pytest.mark.parametrize(
    "options",
    [
        pytest.param(x, marks=() if x == {"method": "fold"} else pytest.mark.slow)
        for x in METHODS
    ],
    ids=str,
)


@pytest.fixture
def x():
    return normal(0, B, T, 5)


def plain(head, **kwargs):
    return head


class Compact(nn.Module):
    wrap: object

    @nn.compact
    def __call__(self, x, train=False):
        x = self.wrap(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)]))(x)
        x = self.wrap(nn.BatchNorm(use_running_average=not train))(x)
        return self.wrap(nn.Dense(2, name="head"))(x)


class Setup(nn.Module):
    wrap: object

    def setup(self):
        self.shared = nn.Dense(5)
        self.again = self.wrap(self.shared)
        self.layers = [self.wrap(nn.Dense(5)) for _ in range(2)]

    def __call__(self, x):
        x = self.again(x) + self.shared(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nn.Module):
    wrap: object

    @nn.compact
    def __call__(self, x, _):
        return x + self.wrap(nn.Dense(5))(x), None


# Variables


@some_methods
@pytest.mark.parametrize("name", zoo.ZOO)
def test_variables_are_those_of_the_layer_without_the_wrapper(key, name, options):
    kind = zoo.ZOO[name]
    rngs = {"params": key, "dropout": key}
    model = TimeDistributed(kind.linen(), in_axes=kind.in_axes, **options)
    first = zoo._step(kind, 0, kind.inputs)

    # Compiled, `init` makes the variables and leaves out the results.
    @jax.jit
    def init(rngs, inputs, first):
        wrapped = model.init(rngs, *inputs, **kind.kwargs)
        return wrapped, kind.linen().init(rngs, *first, **kind.kwargs)

    assert_trees_equal(*init(rngs, kind.inputs, first))


@methods
@pytest.mark.parametrize("model", [Compact, Setup])
def test_a_model_has_the_same_variables_with_and_without_wrappers(
    key, x, model, options
):
    wrapped = model(lambda layer: TimeDistributed(layer, **options))
    variables = jax.jit(wrapped.init)(key, x)
    assert_trees_equal(variables, jax.jit(model(plain).init)(key, x[:, 0]))
    apply = jax.jit(model(plain).apply)
    steps = [apply(variables, x[:, t]) for t in range(T)]
    assert_trees_close(jax.jit(wrapped.apply)(variables, x), jnp.stack(steps, 1))


def test_no_steps_initialise_and_give_no_results(key, x):
    model = TimeDistributed(nn.Dense(2))
    y, variables = model.init_with_output(key, x[:, :0])
    assert y.shape == (B, 0, 2)
    assert_trees_equal(variables, nn.Dense(2).init(key, x[:, 0]))


def test_init_with_output_gives_the_output(key, x):
    y, variables = TimeDistributed(nn.Dense(2)).init_with_output(key, x)
    np.testing.assert_allclose(y, nn.Dense(2).apply(variables, x), rtol=1e-5)


@methods
def test_layers_that_keep_state_of_their_parameters_work(key, x, options):
    for layer in (
        nn.WeightNorm(nn.Dense(2)),
        nn.SpectralNorm(nn.Dense(2), collection_name="batch_stats"),
    ):
        kwargs = {"update_stats": False} if isinstance(layer, nn.SpectralNorm) else {}
        model = TimeDistributed(layer, **options)

        @jax.jit
        def run(key, x, model=model, layer=layer, kwargs=kwargs):
            variables = model.init(key, x, **kwargs)
            y, want = (m.apply(variables, x, **kwargs) for m in (model, layer))
            return (variables, y), (layer.init(key, x[:, 0], **kwargs), want)

        got, want = run(key, x)
        assert_trees_equal(got[0], want[0])
        assert_trees_close(got[1], want[1])


def test_a_shared_embedding_stays_shared(key):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 3)
            h = TimeDistributed(embed)(tokens)
            return TimeDistributed(Logits(embed))(h)

    class Logits(nn.Module):
        embed: nn.Module

        def __call__(self, h):
            return self.embed.attend(h)

    tokens = jnp.arange(6).reshape(2, 3)
    variables = Tied().init(key, tokens)
    assert set(variables["params"]) == {"Embed_0"}
    table = variables["params"]["Embed_0"]["embedding"]
    np.testing.assert_allclose(
        Tied().apply(variables, tokens), table[tokens] @ table.T, rtol=1e-5, atol=1e-6
    )


class SharedInSetup(nn.Module):
    wraps: tuple

    def setup(self):
        shared = nn.Dense(5)
        self.first, self.second = (wrap(shared) for wrap in self.wraps)

    def __call__(self, x):
        return self.second(self.first(x))


def shared_from_outside(wraps):
    shared = nn.Dense(5)
    return nn.Sequential([wrap(shared) for wrap in wraps])


@pytest.mark.parametrize("build", [shared_from_outside, SharedInSetup])
def test_a_layer_shared_by_reference_has_one_set_of_parameters(key, x, build):
    for wraps in (
        (TimeDistributed, TimeDistributed),
        (TimeDistributed, plain),
        (plain, TimeDistributed),
    ):
        model = build(wraps)
        variables = model.init(key, x)
        (dense,) = variables["params"].values()
        want = x @ dense["kernel"] @ dense["kernel"]
        got = model.apply(variables, x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_layer_that_needs_the_axis_name_initialises(key, x):
    class Centred(nn.Module):
        centre: bool = True

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(2)(x)
            self.variable("batch_stats", "first", lambda: h)
            return h - jax.lax.pmean(h, "time") if self.centre else h

    model = TimeDistributed(Centred(), axis_name="time")
    y, variables = model.init_with_output(key, x)
    assert_trees_equal(variables, Centred(centre=False).init(key, x[:, 0]))
    h = Centred(centre=False).apply(variables, x)
    np.testing.assert_allclose(y, h - h.mean(1, keepdims=True), rtol=1e-4, atol=1e-5)


# Inputs


def test_several_inputs_dict_axes_and_keywords(key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, inputs, shift, *, negate):
            y = nn.Dense(2)(inputs["a"] + inputs["b"]) + shift
            return {"y": -y if negate else y, "shift": shift}

    inputs = {"a": normal(1, T, B, 5), "b": normal(2, B, T, 5)}
    shift = normal(3, 2)
    axes = {"in_axes": ({"a": 0, "b": 1}, None), "out_axes": {"y": 0, "shift": None}}
    for options in METHODS:
        model = TimeDistributed(Layer(), **axes, **options)
        variables = model.init(key, inputs, shift, negate=True)
        got = model.apply(variables, inputs, shift, negate=True)
        both = inputs["a"] + jnp.swapaxes(inputs["b"], 0, 1)
        want = (
            -nn.Dense(2).apply({"params": variables["params"]["Dense_0"]}, both) - shift
        )
        assert_trees_close(got, {"y": want, "shift": shift})


def test_nested_over_documents_sentences_and_words(key):
    documents = normal(1, 2, 3, 4, 5, 6)  # batch, section, sentence, word, features
    nested = TimeDistributed(
        TimeDistributed(zoo.Encoder(), method="fold"), chunk_size=2
    )
    variables = nested.init(key, documents)
    assert_trees_equal(variables, zoo.Encoder().init(key, documents[:, 0, 0]))
    flat = zoo.Encoder().apply(variables, documents.reshape(-1, 5, 6))
    np.testing.assert_allclose(
        nested.apply(variables, documents),
        flat.reshape(2, 3, 4, 4),
        rtol=1e-4,
        atol=1e-5,
    )


# State


def batch_norm(**kwargs):
    return nn.BatchNorm(use_running_average=False, momentum=0.9, **kwargs)


def train(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_batch_norm_under_vmap_normalises_each_step(key, x, chunk_size):
    model = TimeDistributed(batch_norm(), chunk_size=chunk_size)
    variables = model.init(key, x)
    for _ in range(2):  # a second call as the first
        y, after = train(model, variables, x)
        steps = [train(batch_norm(), variables, x[:, t]) for t in range(T)]
        assert_trees_close(y, jnp.stack([step for step, _ in steps], 1))
        mean = jax.tree.map(lambda *s: sum(s) / T, *[stats for _, stats in steps])
        assert_trees_close(after, mean)
        variables = {**variables, **after}


def test_batch_norm_under_fold_normalises_batch_and_time_together(key, x):
    model = TimeDistributed(batch_norm(), method="fold")
    variables = model.init(key, x)
    for _ in range(2):
        y, after = train(model, variables, x)
        want, stats = train(batch_norm(), variables, x.reshape(B * T, -1))
        assert_trees_close((y, after), (want.reshape(x.shape), stats))
        variables = {**variables, **after}


@pytest.mark.parametrize("unroll", [1, True])
def test_batch_norm_under_fold_in_chunks_normalises_each_chunk(key, x, unroll):
    model = TimeDistributed(batch_norm(), method="fold", chunk_size=3, unroll=unroll)
    variables = model.init(key, x)
    y, after = train(model, variables, x)
    first, stats_3 = train(batch_norm(), variables, x[:, :3])
    last, stats_1 = train(batch_norm(), variables, x[:, 3:])
    assert_trees_close(y, jnp.concatenate([first, last], 1))
    by_steps = jax.tree.map(lambda a, b: (3 * a + b) / 4, stats_3, stats_1)
    assert_trees_close(after, by_steps)


def test_batch_norm_with_an_axis_name_normalises_all_steps_under_vmap(key, x):
    model = TimeDistributed(batch_norm(axis_name="time"), axis_name="time")
    variables = model.init(key, x)
    y, after = train(model, variables, x)
    assert_trees_close((y, after), train(batch_norm(), variables, x), 1e-4, 1e-4)


def test_counters_are_the_last_steps_and_sown_values_are_stacked(key, x):
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("state", "count", lambda: jnp.int32(0))
            count.value = count.value + 1
            self.sow("intermediates", "total", x.sum())
            return x

    for options in ({}, {"chunk_size": 3}):
        model = TimeDistributed(Counting(), **options)
        variables = model.init(key, x)
        assert variables["state"]["count"] == 1  # as without the wrapper
        _, after = model.apply(variables, x, mutable=["state", "intermediates"])
        assert after["state"]["count"] == 2
        (total,) = after["intermediates"]["total"]
        np.testing.assert_allclose(total, x.sum((0, 2)), rtol=1e-5)


def test_a_name_goes_through_two_wrappers(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = TimeDistributed(TimeDistributed(nn.Dense(5)), name="encoder")(x)
            return nn.Dense(2)(x)

    x = jnp.ones((2, 3, 4, 6))
    variables = Model().init(key, x)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["encoder"] == {"kernel": (6, 5), "bias": (5,)}
    assert set(shapes) == {"encoder", "Dense_0"}
    assert Model().apply(variables, x).shape == (2, 3, 4, 2)


def test_integers_that_a_layer_keeps_are_those_of_the_last_valid_step(key):
    class Last(nn.Module):
        @nn.compact
        def __call__(self, x):
            last = self.variable("state", "last", lambda: jnp.int32(-1))
            last.value = x[0, 0]
            return x

    model = TimeDistributed(Last())
    x = jnp.arange(5).reshape(1, 5, 1)
    run = lambda mask: model.apply(
        {"state": {"last": jnp.int32(-1)}}, x, mask=jnp.array([mask]), mutable="state"
    )
    for mask, last in (
        ([True, True, True, False, False], 2),
        ([True, False, True, True, True], 4),
        ([True, False, False, True, False], 3),
        ([False] * 5, -1),
    ):
        assert run(mask)[1]["state"]["last"] == last


@methods
def test_sown_values_are_stacked_under_every_method(key, x, options):
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "input", x)
            return x

    model = TimeDistributed(Sowing(), **options)
    _, after = model.apply({}, x, mutable=["intermediates"])
    (sown,) = after["intermediates"]["input"]
    np.testing.assert_array_equal(sown, jnp.swapaxes(x, 0, 1))


def test_state_that_does_not_move_stays_bit_for_bit(key, x):
    model = TimeDistributed(nn.BatchNorm(use_running_average=True))
    variables = model.init(key, x)
    stats = jax.tree.map(lambda s: s + 0.1 * normal(1, 5), variables["batch_stats"])
    variables = {**variables, "batch_stats": stats}
    for options in METHODS:
        model = TimeDistributed(nn.BatchNorm(use_running_average=True), **options)
        _, after = train(model, variables, x)
        assert_trees_equal(after["batch_stats"], stats)


@methods
def test_state_that_is_not_written_is_neither_changed_nor_copied(x, options):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = self.variable("buffers", "mask", jnp.zeros, (5, 61))
            return x @ mask.value

    model = TimeDistributed(Masked(), **options)
    variables = {"buffers": {"mask": jnp.full((5, 61), -jnp.inf)}}
    run = lambda x: model.apply(variables, x, mutable=["buffers"])
    _, after = run(x)
    assert_trees_equal(after, variables)
    assert "5,61]" in str(jax.make_jaxpr(run)(x))
    for steps in (1, 3, T):
        assert f"{steps},5,61]" not in str(jax.make_jaxpr(run)(x))


# Randomness


def dropped(y):
    """Which elements are dropped; the others must be scaled by 1 / (1 - rate)."""
    assert set(np.unique(y)) <= {0.0, 2.0}
    return np.asarray(y) == 0


class InnerDropout(nn.Module):
    """Its noise is drawn in a submodule."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x)


def run_dropout(key, calls=1, layer=None, **options):
    layer = layer or nn.Dropout(0.5, deterministic=False)
    model = TimeDistributed(layer, **options)
    apply = lambda model, x: [model(x) for _ in range(calls)]
    ones = jnp.ones((8, 6, 32))
    return nn.apply(apply, model)({}, ones, rngs={"dropout": key})


@methods
def test_each_step_draws_its_own_noise(key, options):
    (y,) = run_dropout(key, **options)
    drops = dropped(y)
    assert 0.4 < drops.mean() < 0.6
    if options.get("chunk_size") and options["method"] == "fold":
        blocks = [drops[:, :3], drops[:, 3:]]
        assert (blocks[0] != blocks[1]).any()
    for t in range(1, 6):
        assert (drops[:, t] != drops[:, 0]).any()


@methods
def test_noise_over_no_steps_and_keys_as_inputs_give_empty_results(key, options):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, keys):
            noise = jax.random.normal(self.make_rng("dropout"), keys.shape)
            return noise + jax.vmap(jax.random.normal)(keys)

    model = TimeDistributed(Noise(), **options)
    rngs = {"params": key, "dropout": key}
    for chunk_size in {1, options.get("chunk_size")}:
        model = model.clone(chunk_size=chunk_size)
        y, _ = model.init_with_output(rngs, jax.random.split(key, (B, 0)))
        assert y.shape == (B, 0)
        assert model.apply({}, jax.random.split(key, (0, T)), rngs=rngs).shape == (0, T)


def test_share_rng_gives_all_steps_the_same_noise(key):
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 4}):
        (y,) = run_dropout(key, share_rng=True, **options)
        drops = dropped(y)
        assert 0.4 < drops.mean() < 0.6
        assert (drops == drops[:, :1]).all()


@pytest.mark.parametrize("layer", [None, InnerDropout()], ids=["bare", "inside"])
def test_noise_does_not_depend_on_the_chunk_size_and_changes_with_each_call(key, layer):
    first, second = run_dropout(key, calls=2, layer=layer)
    assert (first != second).any()
    for options in lowerings(6, methods=["vmap"]):
        got = run_dropout(key, calls=2, layer=layer, **options)
        assert_trees_equal(got, [first, second])


# Flax's own tools


def test_tabulate_shows_the_layer_and_counts_its_parameters(key, x):
    model, wide = Compact(lambda layer: TimeDistributed(layer)), {"width": 200}
    table = nn.tabulate(model, key, console_kwargs=wide)(x)
    assert "TimeDistributed" in table
    assert "head" in table
    count = sum(v.size for v in jax.tree.leaves(Compact(plain).init(key, x)))
    assert f"Total Parameters: {count}" in table


def test_scan_and_remat_and_jit_around_the_wrapper(key, x):
    def build(wrap):
        stack = nn.scan(
            nn.remat(Scanned),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            in_axes=nn.broadcast,
        )
        return nn.jit(stack)(wrap)

    wrapped = build(lambda layer: TimeDistributed(layer, chunk_size=2))
    variables = wrapped.init(key, x, None)
    unwrapped = build(plain)
    assert_trees_equal(variables, unwrapped.init(key, x, None))
    assert_trees_close(
        wrapped.apply(variables, x, None), unwrapped.apply(variables, x, None)
    )


def test_training_with_optax_and_orbax_is_that_of_the_plain_layer(key, x, tmp_path):
    import orbax.checkpoint as ocp

    targets, optimiser = normal(5, B, T, 2), optax.adam(1e-2)

    def fit(model):
        params = model.init(key, x)
        state = optimiser.init(params)

        @jax.jit
        def step(params, state):
            loss = lambda p: jnp.mean((model.apply(p, x) - targets) ** 2)
            updates, state = optimiser.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(5):
            params, state = step(params, state)
        return params

    plain_params = fit(nn.Dense(2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", plain_params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "plain", plain_params)
    for options in METHODS:
        assert_trees_close(fit(TimeDistributed(nn.Dense(2), **options)), restored)


def test_apply_does_not_retrace_and_leaks_no_tracer(key, x):
    traces = []

    class Noting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x.shape)
            return batch_norm()(nn.Dense(2)(x))

    for options in METHODS:
        model = TimeDistributed(Noting(), **options)
        variables = model.init(key, x)
        with jax.checking_leaks():
            run = jax.jit(lambda v, x, model=model: train(model, v, x))
            run(variables, x)
            count = len(traces)
            run(variables, x + 1)
        assert len(traces) == count


# The Dense family


@pytest.mark.parametrize("use_bias", [True, False])
def test_flatten_dense_and_per_step_dense_are_the_core_functions(key, x, use_bias):
    for layer, apply in (
        (FlattenDense(2, use_bias=use_bias), tdjax.flatten_dense),
        (PerStepDense(2, use_bias=use_bias), tdjax.per_step_dense),
    ):
        variables = layer.init(key, x)
        assert ("bias" in variables["params"]) == use_bias
        np.testing.assert_array_equal(
            layer.apply(variables, x), apply(variables["params"], x)
        )


@pytest.mark.parametrize("layer", [FlattenDense, PerStepDense])
def test_dtype_and_param_dtype_are_as_in_flax(key, x, layer):
    model = layer(2, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    y, variables = model.init_with_output(key, x)
    assert y.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float16")}


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda key, x: TimeDistributed(nn.relu),
            TypeError,
            "layer must be an instance of flax.linen.Module",
        ),
        (
            lambda key, x: TimeDistributed(nn.Dense(2), chunk_size=0),
            ValueError,
            "chunk_size must be a positive int, got 0",
        ),
        (
            lambda key, x: run_dropout(key, share_rng=True, method="fold"),
            ValueError,
            "share_rng=True needs method='vmap'",
        ),
        (
            lambda key, x: TimeDistributed(nn.Dense(2)).init(key, x[0, 0]),
            ValueError,
            r"args\[0\] is mapped over axis 1 .* got float32\[5\]",
        ),
        (
            lambda key, x: FlattenDense(2).init(key, x[0, 0]),
            ValueError,
            r"x must have shape \(\.\.\., timesteps, in_features\), got float32\[5\]",
        ),
        (
            lambda key, x: PerStepDense(2).apply(
                PerStepDense(2).init(key, x), x[:, 1:]
            ),
            ValueError,
            r"x must have the timesteps .* float32\[4,5,2\] was made for, got float32\[3,3,5\]",
        ),
        (
            lambda key, x: FlattenDense(2).apply(
                FlattenDense(2).init(key, x), x.reshape(3, 2, 10)
            ),
            ValueError,
            r"x must have the timesteps .* float32\[20,8\] was made for, got float32\[3,2,10\]",
        ),
        (
            lambda key, x: FlattenDense(2.5).init(key, x),
            TypeError,
            "features must be a positive int, got float",
        ),
        (
            lambda key, x: tdjax.time_distributed(nn.Dense(2)),
            TypeError,
            "fun must be a function of arrays, got Dense .* tdjax.linen.TimeDistributed",
        ),
        (
            lambda key, x: tdjax.time_distributed(nn.Dense),
            TypeError,
            "fun must be a function of arrays, got type .* tdjax.linen.TimeDistributed",
        ),
        (
            lambda key, x: TimeDistributed(nn.Dense(2))(x),
            CallCompactUnboundModuleError,
            "unbound modules",
        ),
    ],
)
def test_bad_input_names_the_argument(user_errors, key, x, call, error, message):
    with pytest.raises(error, match=message):
        call(key, x)


def test_frozen_dict_axes_are_accepted(key):
    class Add(nn.Module):
        def __call__(self, inputs):
            return inputs["a"] + inputs["b"]

    inputs = {"a": normal(1, B, T, 2), "b": normal(2, B, T, 2)}
    model = TimeDistributed(Add(), in_axes=(FrozenDict({"a": 1, "b": 1}),))
    np.testing.assert_array_equal(model.apply({}, inputs), inputs["a"] + inputs["b"])


# Names, methods and intermediates


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = TimeDistributed(nn.Dense(5), name="encoder")(x)
        x = TimeDistributed(nn.Dense(4))(x)
        return nn.Dense(3)(x)


def test_a_name_given_to_the_wrapper_is_the_layers(key, x):
    over_time = nn.vmap(
        nn.Dense, {"params": None}, {"params": False}, in_axes=1, out_axes=1
    )

    class ByVmap(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = over_time(5, name="encoder")(x)
            x = nn.Dense(4)(x)
            return nn.Dense(3)(x)

    variables = Named().init(key, x)
    assert_trees_equal(variables, ByVmap().init(key, x))
    got = Named().apply(variables, x)
    assert_trees_close(got, ByVmap().apply(variables, x))


def test_two_names_for_one_layer_are_refused(key, x, user_errors):
    class Twice(nn.Module):
        used: bool = False

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(5, name=None if self.used else "a")
            x = layer(x) if self.used else x
            return TimeDistributed(layer, name="b")(x)

    for used, old in ((False, "a"), (True, "Dense_0")):
        with pytest.raises(
            ValueError, match=f"name='b' names the layer, which .* '{old}'"
        ):
            Twice(used).init(key, x)


def test_a_layer_with_its_wrappers_name_is_shared_as_before(key, x):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(5)
            return TimeDistributed(layer, name="head")(x) + layer(x)

    variables = Shared().init(key, x)
    assert list(variables["params"]) == ["head"]
    want = 2 * nn.Dense(5).apply({"params": variables["params"]["head"]}, x)
    assert_trees_close(Shared().apply(variables, x), want)

    class TwoNames(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(5)
            y = TimeDistributed(layer, name="a")(x)
            return y + TimeDistributed(layer, name="b")(x)

    with pytest.raises(ValueError, match=r"name='b' names the layer, .* 'a' already"):
        TwoNames().init(key, x)


def test_only_methods_of_the_layer_are_found(key, x):
    assert not hasattr(TimeDistributed(nn.Dense(3)), "kernel_init")
    nested = TimeDistributed(TimeDistributed(AutoEncoder()))
    films = jnp.stack([x, x], 1)
    variables = nested.init(key, films)
    want = AutoEncoder().apply(variables, films, method="encode")
    assert_trees_close(nested.apply(variables, films, method="encode"), want)


class AutoEncoder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(2), nn.Dense(5)

    def encode(self, x, scale=1.0):
        return scale * self.encoder(x)

    def __call__(self, x):
        return self.decoder(self.encode(x))


@methods
def test_other_methods_of_the_layer_run_over_time_too(key, x, options):
    model, layer = TimeDistributed(AutoEncoder(), **options), AutoEncoder()
    variables = model.init(key, x)
    want = layer.apply(variables, x, scale=2.0, method="encode")
    got = model.apply(variables, x, scale=2.0, method="encode")
    assert_trees_close(got, want)
    mask = jnp.ones((B, T), bool).at[0, 1].set(False)
    masked = model.apply(variables, x, mask=mask, method="encode")
    assert_trees_close(masked, jnp.where(mask[..., None], want / 2, 0))
    assert_trees_close(model.bind(variables).encode(x), want / 2)
    with pytest.raises(AttributeError, match="decode"):
        model.apply(variables, x, method="decode")


def test_intermediates_of_layer_and_wrapper_are_kept_apart(key, x):
    model = TimeDistributed(nn.Dense(2))
    variables = model.init(key, x)
    y, state = model.apply(variables, x, capture_intermediates=True)
    assert_trees_equal(state["intermediates"]["TimeDistributed.__call__"], (y,))
    (steps,) = state["intermediates"]["__call__"]
    assert_trees_close(jnp.moveaxis(steps, 0, 1), y)


def test_statistics_under_a_mask_that_the_layer_does_not_get_are_warned_of(key, x):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            norm = nn.BatchNorm(use_running_average=False, momentum=0.0)
            return norm(x, mask=mask[:, None])

    mask = jnp.ones((B, T), bool).at[0, 1].set(False)
    plain = TimeDistributed(nn.BatchNorm(use_running_average=False))
    variables = plain.init(key, x)
    run = lambda mask: plain.apply(variables, x, mask=mask, mutable=["batch_stats"])
    with pytest.warns(
        UserWarning, match=r"writes statistics .*mean.*mask=mask\[:, None\]"
    ):
        run(mask)
    with pytest.warns(UserWarning, match="writes statistics") as warned:
        jax.jit(run)(mask)
    assert [each.filename for each in warned] == [__file__]  # The user's line.
    run(jnp.ones((B, T), bool).at[:, 1].set(False))  # Whole steps: no stand-ins count.
    spectral = TimeDistributed(nn.SpectralNorm(nn.Dense(2)))
    kept = spectral.init(key, x, update_stats=False)
    spectral.apply(kept, x, mask=mask, update_stats=True, mutable=["batch_stats"])
    model = TimeDistributed(Norm())
    variables = model.init(key, x, mask)
    _, state = model.apply(variables, x, mask, mask=mask, mutable=["batch_stats"])
    means = [x[mask[:, t], t].mean(0) for t in range(T)]
    got = state["batch_stats"]["BatchNorm_0"]["mean"]
    assert_trees_close(got, jnp.stack(means).mean(0))


def test_a_filter_of_intermediates_may_keep_all(key, x):
    model = TimeDistributed(nn.Dense(2))
    keep = lambda module, name: True
    _, state = model.apply(
        model.init(key, x), x, capture_intermediates=keep, mutable=["intermediates"]
    )
    kept = state["intermediates"]
    (layer,), (wrapper,) = kept["__call__"], kept["TimeDistributed.__call__"]
    np.testing.assert_array_equal(layer.swapaxes(0, 1), wrapper)


def test_numbers_in_the_masks_shape_are_no_mask(key):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(9, 3)(ids)
            return nn.BatchNorm(use_running_average=False)(x)

    model, ids = TimeDistributed(Norm()), jnp.arange(B * T).reshape(B, T) % 9
    mask = jnp.ones((B, T), bool).at[0, 1].set(False)
    variables = model.init(key, ids)
    run = lambda ids: model.apply(variables, ids, mask=mask, mutable=["batch_stats"])
    with pytest.warns(UserWarning, match="writes statistics"):
        run(ids)
    run(mask.astype(int))  # This may be the mask.


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_packed_statistics_are_those_of_the_valid_steps(key, chunk_size):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            norm = nn.BatchNorm(use_running_average=False, momentum=0.0)
            return norm(2 * x, mask=mask[:, None])

    mask = tdjax.lengths_to_mask(jnp.array([4, 0, 2]), 5)
    x = jnp.where(mask[..., None], normal(0, 3, 5, 3), jnp.nan)
    model = TimeDistributed(Net(), method="fold", capacity=7, chunk_size=chunk_size)
    init = lambda: model.clone(capacity=None).init(key, x, mask, mask=mask)
    apply = lambda v, x, mask: model.apply(
        v, x, mask, mask=mask, mutable=["batch_stats"]
    )
    if chunk_size:
        with pytest.raises(ValueError, match="the same array twice"):
            jax.jit(apply)(init(), x, mask)
        return
    _, state = jax.jit(apply)(init(), x, mask)
    valid = 2 * np.asarray(x)[np.asarray(mask)].astype(np.float64)
    got = jax.tree.leaves(state["batch_stats"])
    for value, expected in zip(got, (valid.mean(0), valid.var(0))):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
