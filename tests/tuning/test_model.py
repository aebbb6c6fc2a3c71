"""Whole models: each place is found, tuned on what reaches it, and put together."""

import gc
import pickle
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.errors import InvalidRngError

import tdjax
from helpers import assert_trees_close, normal, printed, slow_but
from tdjax._tuning import model as _model
from tdjax._tuning.table import anywhere, key_of

X = normal(0, 3, 6, 4)
wrap = tdjax.linen.TimeDistributed
QUICK = {"budget": 60.0, "candidates": [{"chunk_size": 2}, {"method": "fold"}]}


@pytest.fixture(autouse=True)
def the_last_wins(monkeypatch):
    """Times of tiny programs are noise: the last candidate that agrees is the best."""

    def last(candidates):
        return [c for c in candidates if c.verdict in ("measured", "behind")][-1]

    for module in ("autotune", "result", "model"):
        monkeypatch.setattr(f"tdjax._tuning.{module}.choose", last)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(5)(x))


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, train=False):
        x = wrap(Encoder(), name="encoder")(x, mask=mask)
        x = nn.RNN(nn.GRUCell(5))(x)
        return wrap(nn.Dense(2), name="head")(x)


class Setup(nn.Module):
    def setup(self):
        self.layers = [wrap(nn.Dense(4)), wrap(nn.Dense(3))]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.end(x)

    def end(self, x):
        return x * 2


class Attribute(nn.Module):
    head: nn.Module

    def __call__(self, x):
        return self.head(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return x + layer(x), None

        over_layers = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return over_layers(wrap(nn.Dense(4), name="block"), x, None)[0]


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return wrap(wrap(Encoder()), name="documents")(x[:, :, None])


MODELS = {
    "compact": (Compact(), ["encoder", "head"]),
    "setup": (Setup(), ["layers_0", "layers_1"]),
    "attribute": (Attribute(wrap(nn.Dense(3))), ["head"]),
    "sequence": (
        nn.Sequential([wrap(nn.Dense(5)), nn.relu, wrap(nn.Dense(2))]),
        ["layers_0", "layers_2"],
    ),
    "scan": (Scanned(), ["block"]),
    "nested": (Nested(), ["documents", "documents (2)"]),
}


def gradients(model, variables):
    return jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, X))))(variables)


@pytest.mark.parametrize("name", slow_but([4], MODELS))
def test_a_linen_model_comes_back_tuned_with_the_same_parameters(name, key):
    model, names = MODELS[name]
    variables = model.init(key, X)
    result = tdjax.linen.autotune(model, variables, X, argnums=0, **QUICK)
    assert result.failures == {}
    assert list(result.places) == names
    folds = {name: options["method"] for name, options in result.options.items()}
    assert set(folds.values()) == {"fold"}
    tuned = result.tuned
    assert isinstance(tuned, type(model))
    assert (tuned.name, type(tuned).__name__) == (model.name, type(model).__name__)
    assert_trees_close(tuned.apply(variables, X), model.apply(variables, X))
    assert_trees_close(gradients(tuned, variables), gradients(model, variables))
    same = (
        jax.tree.map(jnp.shape, tuned.init(key, X)),
        jax.tree.map(jnp.shape, variables),
    )
    assert same[0] == same[1]
    assert len(result.candidates) == 2
    assert "tuned" in printed(result)


def test_the_tuned_model_is_another_program_with_the_same_results(key):
    model, _ = MODELS["setup"]
    variables = model.init(key, X)
    result = tdjax.linen.autotune(model, variables, X, **QUICK)
    program = lambda model: str(jax.make_jaxpr(model.apply)(variables, X))
    assert program(result.tuned) != program(model)
    again = pickle.loads(pickle.dumps(result.tuned))
    assert program(again) == program(result.tuned)
    by_name = result.tuned.apply(variables, X, method="end")
    assert_trees_close(by_name, 2 * X)
    # Tuned once more, it is the plain model that is tuned.
    once_more = tdjax.linen.autotune(result.tuned, variables, X, **QUICK)
    assert list(once_more.places) == list(result.places)
    assert program(once_more.tuned) == program(result.tuned)


class InlineLayers(nn.Module):
    """Layers that are made here, and called inside of others."""

    @nn.compact
    def __call__(self, x):
        layers = [nn.Dense(4), nn.relu, nn.Dense(3)]
        over_time = tdjax.linen.TimeDistributed(nn.Sequential(layers), name="layers")
        return over_time(x)


def test_layers_that_are_made_outside_of_their_place_are_tuned(key):
    model = InlineLayers()
    variables = model.init(key, X)
    result = tdjax.linen.autotune(model, variables, X, argnums=0, **QUICK)
    assert result.failures == {}
    (place,) = result.places.values()
    # The gradient is by their parameters.
    assert place.about["argnums"] == [0]
    run = lambda model: jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, X))))
    assert_trees_close(run(result.tuned)(variables), run(model)(variables))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        layers = [nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)]
        self.encoder = tdjax.nnx.TimeDistributed(layers[0])
        self.head = layers[1]

    def __call__(self, x):
        x = nnx.relu(self.encoder(x))
        return tdjax.nnx.TimeDistributed(self.head)(x)


def test_an_nnx_model_comes_back_tuned_with_the_same_variables():
    model = NnxModel(nnx.Rngs(0))
    result = tdjax.nnx.autotune(model, X, argnums=0, **QUICK)
    assert list(result.places) == ["encoder", "head"]
    assert {o["method"] for o in result.options.values()} == {"fold"}
    tuned = result.tuned
    assert isinstance(tuned, NnxModel)
    assert tuned.head is model.head
    assert_trees_close(tuned(X), model(X))
    assert_trees_close(nnx.jit(tuned)(X), model(X))
    once_more = tdjax.nnx.autotune(tuned, X, **QUICK)
    assert list(once_more.places) == list(result.places)
    assert_trees_close(once_more.tuned(X), model(X))
    loss = lambda model: jnp.sum(jnp.sin(model(X)))
    assert_trees_close(
        nnx.to_pure_dict(nnx.grad(loss)(tuned)), nnx.to_pure_dict(nnx.grad(loss)(model))
    )


class Scaled(tdjax.nnx.TimeDistributed):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_subclass_of_the_wrapper_keeps_what_it_does():
    layer = Scaled(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    result = tdjax.nnx.autotune(layer, X, **QUICK)
    assert isinstance(result.tuned, Scaled)
    assert result.options
    assert_trees_close(result.tuned(X), layer(X))


def test_only_what_a_gradient_reaches_is_differentiated(key):
    model = Compact()
    variables = model.init(key, X)
    whole = _model.Model("m", model.apply, (variables, X), lambda changes: None)
    found = _model.record(lambda: model.apply(variables, X))
    assert [place.name for place in found] == ["encoder", "head"]
    # The input of the first layer is data.
    keys = [anywhere(key_of(place)) for place in found]
    by_key = lambda *reached: dict(zip(keys, reached))
    assert _model.record_gradient(whole, [0]) == by_key([False], [True])
    assert _model.record_gradient(whole, [1]) == by_key([True], [True])


def test_arrays_that_reach_a_place_are_the_models_own(key):
    model = Compact()
    variables = model.init(key, X)
    encoder, head = _model.record(lambda: model.apply(variables, X))
    assert encoder.args[0] is X
    (of_head,) = head.program().variables
    assert_trees_close(of_head["params"], variables["params"]["head"])
    *_, scanned = _model.record(lambda: Scanned().apply(Scanned().init(key, X), X))
    filled = _model.with_arrays(scanned)
    assert filled.args[0].shape == X.shape
    assert filled.program().variables[0]["params"]["kernel"].shape == (4, 4)


@pytest.mark.slow
def test_state_noise_masks_and_keywords_of_a_model(key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            return wrap(Layer(), name="layer")(x, train=train, mask=mask)

    model, mask = Whole(), tdjax.lengths_to_mask(jnp.array([6, 2, 0]), 6)
    variables = model.init(key, X, mask, train=False)
    args, options = (variables, X, mask), {"argnums": 0, **QUICK}
    serve = tdjax.linen.autotune(model, *args, train=False, **options)
    assert serve.options["layer"]["method"] == "fold"
    noise = {"rngs": {"dropout": key}, "mutable": ["batch_stats"]}
    with pytest.warns(UserWarning, match="writes statistics"):
        train = tdjax.linen.autotune(model, *args, train=True, **noise, **options)
    (place,) = train.places.values()
    verdicts = {str(c): c.verdict for c in place.candidates}
    assert verdicts["method='fold'"] == "other numbers than the reference"


def test_a_layer_with_variables_of_another_is_tuned(key):
    class Shared(nn.Module):
        def setup(self):
            self.table = nn.Embed(7, 4)
            self.head = wrap(Tied(self.table))

        def __call__(self, ids):
            return self.head(self.table(ids))

    class Tied(nn.Module):
        table: nn.Module

        def __call__(self, x):
            return self.table.attend(x)

    model, ids = Shared(), jnp.ones((2, 3), int)
    variables = model.init(key, ids)
    result = tdjax.linen.autotune(model, variables, ids, **QUICK)
    assert list(result.places) == ["head"]
    assert not result.failures
    assert_trees_close(result.tuned.apply(variables, ids), model.apply(variables, ids))


def test_what_a_place_needs_from_its_surroundings_is_a_row(key):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            head = wrap(nn.Dense(2), name="head")
            centre = lambda x: x - jax.lax.pmean(x, "examples")
            over_time = tdjax.time_distributed(centre)
            return head(jax.vmap(over_time, axis_name="examples")(x[:, None])[:, 0])

    variables = Named().init(key, X)
    result = tdjax.linen.autotune(Named(), variables, X, **QUICK)
    assert list(result.places) == ["head"]
    (name,) = result.failures
    assert f"{name}: not tuned: NameError" in printed(result)
    want = Named().apply(variables, X)
    assert_trees_close(result.tuned.apply(variables, X), want)


def test_functions_over_time_in_a_model_are_places_too(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return tdjax.time_distributed(jnp.tanh)(nn.Dense(4)(x))

    variables = Model().init(key, X)
    result = tdjax.linen.autotune(Model(), variables, X, **QUICK)
    assert list(result.places) == ["tanh"]


def test_a_model_leaves_nothing_in_memory(key):
    model = Setup()
    variables = model.init(key, X)
    x = normal(3, *X.shape) + 0.0
    gone = weakref.ref(x)
    tdjax.linen.autotune(model, variables, x, **QUICK)
    del x
    gc.collect()
    assert gone() is None


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return wrap(nn.Dense(4), name="head")(x)


def test_flags_are_given_by_name(key, user_errors):
    variables = Flagged().init(key, X, False)
    with pytest.raises(TypeError, match=r"args must be arrays, got bool .* by their"):
        tdjax.linen.autotune(Flagged(), variables, X, False, **QUICK)
    result = tdjax.linen.autotune(Flagged(), variables, X, train=False, **QUICK)
    assert list(result.places) == ["head"]


def test_what_fails_before_the_first_place_is_said(key, user_errors):
    variables = Flagged().init(key, X, False)
    with pytest.raises(InvalidRngError) as error:
        tdjax.linen.autotune(Flagged(), variables, X, train=True, **QUICK)
    notes = "".join(error.value.__notes__)
    assert "taken for a layer for one step, since as a model on all steps" in notes


@jax.custom_vjp
def _by_hand(w, x):
    return tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))(w, x)


_by_hand.defvjp(
    lambda w, x: (tdjax.dense(w, x), (w, x)),
    lambda saved, g: jax.vjp(tdjax.dense, *saved)[1](g),
)


class ByHand(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = lambda key: tdjax.init_dense(key, x.shape[-1], 3)
        return _by_hand(self.param("dense", init), x)


def test_a_place_in_a_custom_derivative_is_tuned(key):
    variables = ByHand().init(key, X)
    result = tdjax.linen.autotune(ByHand(), variables, X, argnums=0, **QUICK)
    assert result.failures == {}
    assert list(result.places) == ["dense"]


class TwoWays(nn.Module):
    """One layer, given once as it is and once in blocks."""

    @nn.compact
    def __call__(self, x):
        x = wrap(nn.Dense(4), name="whole")(x)
        return wrap(nn.Dense(4), name="blocks", chunk_size=2)(x)


@pytest.mark.slow
def test_a_candidate_is_measured_as_it_is_beside_a_place_of_the_same_layer(key):
    variables = TwoWays().init(key, X)
    result = tdjax.linen.autotune(TwoWays(), variables, X, **QUICK)
    alone = tdjax.linen.autotune(
        wrap(nn.Dense(4)), {"params": variables["params"]["whole"]}, X, **QUICK
    )
    memory = lambda tuning: [c.temporary_bytes for c in tuning.candidates]
    assert memory(result.places["whole"]) == memory(alone)


def test_ctrl_c_before_the_whole_was_timed_loses_no_place(key, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_model, "measure_all", interrupted)
    model = Setup()
    variables = model.init(key, X)
    result = tdjax.linen.autotune(model, variables, X, **QUICK)
    assert len(result.places) == 2
    assert not result.finished
    assert "Setup: interrupted before the whole was compared" in printed(result)
    assert_trees_close(result.tuned.apply(variables, X), model.apply(variables, X))


def test_ctrl_c_in_a_later_place_loses_none_before(key, monkeypatch):
    tune, calls = _model.tune, []

    def interrupted(place, *args):
        calls.append(place.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tune(place, *args)

    monkeypatch.setattr(_model, "tune", interrupted)
    model = Setup()
    variables = model.init(key, X)
    result = tdjax.linen.autotune(model, variables, X, **QUICK)
    assert list(result.places) == calls[:1]
    assert not result.finished
    assert f"{calls[1]}: not tuned: interrupted before it was measured" in printed(
        result
    )
    calls.clear()
    calls.append("an earlier one")
    with pytest.raises(KeyboardInterrupt):
        tdjax.linen.autotune(model, variables, X, **QUICK)


@pytest.mark.slow
def test_options_of_the_compiler_are_tried_with_the_whole(key):
    variables = Setup().init(key, X)
    options = [{"xla_cpu_enable_fast_math": True}]
    result = tdjax.linen.autotune(
        Setup(), variables, X, compiler_options=options, **QUICK
    )
    whole = [bool(c.compiler_options) for c in result.candidates]
    assert whole == [False, False, True, True]
    assert result.compiler_options == options[0]  # The last one is taken here.
    for place in result.places.values():
        assert not any(c.compiler_options for c in place.candidates)


def test_a_layer_that_carries_its_state_is_tuned(key):
    norm = nn.BatchNorm(use_running_average=False)
    layer = wrap(norm, variable_carry="batch_stats")
    variables = layer.init(key, X)
    result = tdjax.linen.autotune(layer, variables, X, mutable=["batch_stats"], **QUICK)
    verdicts = {c.options["method"]: c.verdict for c in result.candidates}
    assert verdicts["fold"].startswith("failed: ValueError: variable_carry=")
    assert result.options["method"] == "vmap"
