"""Tables of options as contexts, and files that grow while a function is traced."""

import dataclasses
import enum
import functools
import json
import multiprocessing
import pickle
import threading
import warnings
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList
from jax.sharding import PartitionSpec

import tdjax
from helpers import assert_trees_close, normal, printed
from tdjax._linen_scopes import module_text, written_collections
from tdjax._steps.lowering import Lowering
from tdjax._steps.places import value_text
from tdjax._tuning import on_miss, table
from tdjax._tuning.candidates import TUNED, Candidate
from tdjax._tuning.table import in_effect, key_of
from tuning.tuned_dense import QUICK, X

PARAMS = tdjax.init_dense(jax.random.key(0), 4, 5)
FOLD = {"method": "fold", "chunk_size": None, "unroll": 1, "remat": False}


def auto(fun=tdjax.dense, **options):
    return tdjax.time_distributed(fun, in_axes=(None, 1), method="auto", **options)


def taken_by(monkeypatch, options):
    """Lets the tuner take these options, whatever is faster."""

    def choose(candidates):
        return next(c for c in candidates if c.options == options)

    for module in ("autotune", "result", "model"):
        monkeypatch.setattr(f"tdjax._tuning.{module}.choose", choose)


def program(fun, *args):
    return str(jax.make_jaxpr(fun)(*args))


@pytest.fixture
def found(monkeypatch):
    taken_by(monkeypatch, FOLD)
    return tdjax.autotune(auto(), PARAMS, X, **QUICK)


def test_auto_without_a_table_is_vmap():
    plain = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
    assert program(auto(), PARAMS, X) == program(plain, PARAMS, X)


def test_a_context_sets_the_options_of_the_same_place_only(found):
    fold = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), method="fold")
    plain = program(auto(), PARAMS, X)
    with found as entered:
        assert entered is found
        assert program(auto(), PARAMS, X) == program(fold, PARAMS, X) != plain
        vmap = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
        assert program(vmap, PARAMS, X) == plain
        longer = jnp.tile(X, (1, 2, 1))
        assert program(auto(), PARAMS, longer) != program(fold, PARAMS, longer)
        assert "18,4" not in program(auto(lambda p, x: x), PARAMS, X)
    assert program(auto(), PARAMS, X) == plain


def test_the_log_says_what_is_in_a_table(found, caplog):
    caplog.set_level("DEBUG", logger="tdjax")
    with found:
        auto()(PARAMS, X)
        auto()(PARAMS, X[:, :3])
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("dense: in a table, {'method': 'fold'")
    assert second.startswith("dense: not in this table, {")


def test_a_compiled_function_is_compiled_again_where_a_table_is_in_effect(found):
    traced = []

    @jax.jit
    def run(x):
        traced.append(1)
        return auto()(PARAMS, x)

    outside = run(X)
    with found:
        inside = run(X)
        assert_trees_close(inside, outside)
        run(X)
    run(X)
    with tdjax.Tuning.from_json(found.to_json()):
        run(X)
    assert len(traced) == 2


def test_contexts_nest_and_the_inner_one_comes_first(found, monkeypatch):
    other = tdjax.autotune(auto(lambda p, x: jnp.tanh(x)), PARAMS, X, **QUICK)
    chunks = {"method": "vmap", "chunk_size": 2, "unroll": 1, "remat": False}
    with found:
        fold = program(auto(), PARAMS, X)
        with other:
            assert program(auto(), PARAMS, X) == fold
        taken_by(monkeypatch, chunks)
        inner = tdjax.autotune(auto(), PARAMS, X, **QUICK)
        with inner:
            assert "scan" in program(auto(), PARAMS, X)
    assert list((found | inner).places) == ["dense"]
    with found | inner:
        assert "scan" in program(auto(), PARAMS, X)


def test_an_error_leaves_the_context(found):
    plain = program(auto(), PARAMS, X)
    with pytest.raises(KeyError), found:
        raise KeyError
    assert program(auto(), PARAMS, X) == plain


def test_results_are_merged_saved_and_loaded(found):
    other = tdjax.autotune(auto(lambda p, x: jnp.tanh(x)), PARAMS, X, **QUICK)
    longer = tdjax.autotune(auto(), PARAMS, jnp.tile(X, (1, 2, 1)), **QUICK)
    both = found | other | longer
    assert [*both.places][::2] == ["dense", "dense (2)"]
    assert len(both.options) == 3
    loaded = tdjax.Tuning.from_json(both.to_json())
    assert loaded.options_by_key() == both.options_by_key()
    assert "3 places" in repr(loaded)
    twice = both | loaded
    assert twice.options_by_key() == both.options_by_key()
    moved = tdjax.autotune(auto(), PARAMS, X[:, :3], **QUICK)
    assert len((both | (moved | found)).options_by_key()) == 4
    with pytest.raises(ValueError, match="best must be asked of a place"):
        _ = loaded.best
    with pytest.raises(TypeError):
        _ = found | 1


def test_half_of_a_spread_is_no_result(found):
    text = json.loads(found.to_json())
    text["candidates"][0]["ratio_spread"] = [None, 1.0]
    with pytest.raises(ValueError, match="half of a spread"):
        tdjax.Tuning.from_json(json.dumps(text))


def test_a_tuned_nnx_layer_keeps_its_sharding():
    sharding = jax.sharding.PartitionSpec("data", None)
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        given = tdjax.nnx.TimeDistributed(layer, sharding=sharding)
        result = tdjax.nnx.autotune(given, X, **QUICK)
    assert result.tuned.sharding == sharding


def test_fold_in_a_table_is_shown_to_be_right_again(found):
    """The function of this name is another one by now."""

    def dense(params, x):
        return tdjax.dense(params, x - x.mean(0))

    dense.__qualname__ = "dense"
    with (
        found,
        pytest.warns(UserWarning, match="dense may depend on .* reduce_sum"),
    ):
        y = auto(dense)(PARAMS, X)
    assert_trees_close(y, tdjax.time_distributed(dense, in_axes=(None, 1))(PARAMS, X))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
        self.sow("seen", "x", x)
        return nn.Dropout(0.5, deterministic=False)(x)


def test_what_is_not_shown_leaves_nothing_behind(key):
    models = [tdjax.linen.TimeDistributed(Noisy(), method=m) for m in ("auto", "vmap")]
    variables = models[0].init({"params": key, "dropout": key}, X)
    del variables["seen"]
    mutable = ["batch_stats", "seen"]
    run = lambda model: model.apply(
        variables, X, rngs={"dropout": key}, mutable=mutable
    )
    place = models[0]._place_of("__call__", (X,), {}, Lowering("auto"), None, mutable)
    refused = pytest.warns(UserWarning, match="rest of the batch")
    with in_effect({key_of(place): FOLD}), refused:
        got = run(models[0])
    want = run(models[1])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_trees_close(got, want)


def over_examples(x):
    return jax.nn.softmax(x, 0)


def over_features(x):
    return jax.nn.softmax(x, -1)


def test_what_was_shown_of_one_argument_is_not_said_of_another():
    plain = tdjax.time_distributed(lambda x, *, norm: norm(x))
    over_time = tdjax.time_distributed(lambda x, *, norm: norm(x), method="auto")
    over_features.__qualname__ = over_examples.__qualname__  # As those of lambdas are.
    keywords = [{"norm": over_features}, {"norm": over_examples}]
    keys = {key_of(over_time.place((X,), given)) for given in keywords}
    with in_effect(dict.fromkeys(keys, FOLD)):
        assert len(keys) == 1
        right = jax.jit(lambda x: over_time(x, **keywords[0]))(X)
        with pytest.warns(UserWarning, match="may depend on the rest of the batch"):
            refused = jax.jit(lambda x: over_time(x, **keywords[1]))(X)
    assert_trees_close(right, plain(X, **keywords[0]))
    assert_trees_close(refused, plain(X, **keywords[1]))


class Centred(nn.Module):
    """Subtracts the running mean; in training, that of the batch."""

    @nn.compact
    def __call__(self, x):
        running = self.variable("batch_stats", "mean", lambda: jnp.zeros(x.shape[-1]))
        mean = running.value
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            mean = running.value = x.mean(0)
        return x - mean


def test_what_was_shown_of_inference_is_not_said_of_training(key):
    model = tdjax.linen.TimeDistributed(Centred(), method="auto")
    variables = model.init(key, X)
    training = {"mutable": ["batch_stats"]}
    keys = [
        tdjax.linen.autotune(model, variables, X, **QUICK, **options).key
        for options in ({}, training)
    ]
    assert keys[0] != keys[1]
    with in_effect(dict.fromkeys(keys, FOLD)):
        jax.jit(model.apply)(variables, X)
        with pytest.warns(UserWarning, match="may depend on the rest of the batch"):
            y, _ = jax.jit(lambda v, x: model.apply(v, x, **training))(variables, X)
    plain = tdjax.linen.TimeDistributed(Centred())
    assert_trees_close(y, plain.apply(variables, X, **training)[0])


def test_a_model_that_is_better_as_it_was_has_no_table():
    chosen = Candidate(Lowering("fold"), verdict="measured", run_seconds=1.0, ratio=1.0)
    found = tdjax.Tuning(None, [chosen], {}, name="dense", key="a key")
    refused = refused_model({"dense": found})
    tuned = refused.candidates[1]
    assert refused.options_by_key() == {}
    assert (refused | refused).options_by_key() == {}
    unchanged = tdjax.Tuning(None, [], {"argnums": []}, name="Model", places={})
    assert "Model: stays as it was given" in printed(unchanged)
    tuned.verdict, tuned.ratio = "measured", 0.5
    assert refused.options_by_key() == found.options_by_key()


def test_a_table_has_no_options_of_the_compiler(tmp_path):
    fields = {"run_seconds": 1.0, "ratio": 1.0}
    default = Candidate(Lowering(), is_default=True, verdict="behind", **fields)
    fields["ratio"] = 0.5
    fast = Candidate(
        Lowering("fold"), compiler_options={"a": 1}, verdict="measured", **fields
    )
    found = tdjax.Tuning(None, [default, fast], {}, key="a key")
    assert found.options["method"] == "fold"
    assert found.options_by_key() == {"a key": default.options}
    unfinished = tdjax.Tuning(None, [default, fast], {}, finished=False, key="a key")
    path = tmp_path / "table.json"
    for one in (unfinished, refused_model({"dense": unfinished})):
        path.write_text(one.to_json())
        with tdjax.tuning(path):
            pass


def refused_model(places):
    model = Candidate(
        Lowering(), is_default=True, verdict="measured", ratio=1.0, run_seconds=1.0
    )
    tuned = Candidate(TUNED, verdict="other numbers than the reference")
    return tdjax.Tuning(None, [model, tuned], {}, places=places)


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        if self.is_mutable_collection("losses"):
            self.sow("losses", "load", x.mean(0))
        return nn.Dense(3)(x)


def test_a_collection_that_is_made_is_another_call(key):
    model = tdjax.linen.TimeDistributed(Sowing(), method="auto")
    variables = {"params": model.init(key, X)["params"]}
    making = {"mutable": ["losses"]}
    keys = [
        tdjax.linen.autotune(model, variables, X, **QUICK, **options).key
        for options in ({}, making)
    ]
    plain = tdjax.linen.TimeDistributed(Sowing())
    with in_effect(dict.fromkeys(keys, FOLD)):
        y = model.apply(variables, X)
        with pytest.warns(UserWarning, match="may depend on the rest of the batch"):
            made = model.apply(variables, X, **making)
    assert_trees_close(y, plain.apply(variables, X))
    assert_trees_close(made, plain.apply(variables, X, **making))


def test_filters_of_collections_are_part_of_a_key():
    there = {"params": {}, "batch_stats": {}}
    filters = [False, True, "seen", ["seen", "losses"], {"losses"}, DenyList("params")]
    texts = [str(written_collections(there, each)) for each in filters]
    assert len({*texts}) == len(filters)
    assert written_collections(there, {"seen"}) == written_collections(there, "seen")


def test_another_method_than_a_given_fold_is_shown_to_be_right_too():
    mixing = lambda params, x: tdjax.dense(params, x - x.mean(0))
    given = tdjax.time_distributed(mixing, in_axes=(None, 1), method="fold")
    options = FOLD | {"method": "vmap"}
    refused = pytest.warns(UserWarning, match="write 'vmap', and tune it again")
    with in_effect({}, {key_of(given.place((PARAMS, X), {})): options}), refused:
        y = given(PARAMS, X)
    assert_trees_close(y, given(PARAMS, X))


def test_what_was_shown_of_nested_layers_is_remembered(monkeypatch, key):
    inner = tdjax.linen.TimeDistributed(nn.Dense(3), method="auto")
    model = tdjax.linen.TimeDistributed(inner, method="auto")
    x = normal(1, 2, 3, 4, 5)
    variables = model.init(key, x)
    place_key = tdjax.linen.autotune(model, variables, x, **QUICK).key
    proofs, prove = [], table._why_not_folded
    monkeypatch.setattr(
        table, "_why_not_folded", lambda *args: proofs.append(1) or prove(*args)
    )
    monkeypatch.setattr(table, "_shown", {})
    with in_effect({place_key: FOLD}):
        model.apply(variables, x)
        model.apply(variables, x)
    assert len(proofs) == 1


@dataclasses.dataclass
class Config:
    train: bool
    inner: Any = None


@flax.struct.dataclass
class Batch:
    x: Any


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


def test_values_of_all_kinds_have_texts_without_addresses():
    conv = functools.partial(nn.Conv, kernel_size=(3, 3))
    values = [
        conv, functools.partial(nn.Conv, kernel_size=(1, 1)), Config(True),
        Config(False), Batch(jnp.ones(3)), Batch(jnp.ones(4)), Size.SMALL, Size.LARGE,
        PartitionSpec("data"), PartitionSpec("data", None), nn.Dense(3), nn.Dense(4),
        jax.tree_util.Partial(jnp.sin, 1.0), jax.tree_util.Partial(jnp.sin, X),
    ]  # fmt: skip
    texts = [value_text(value, {}) for value in values]
    assert len({*texts}) == len(values)
    assert not any("0x" in text for text in texts)
    circle = Config(True)
    circle.inner = circle
    assert value_text(circle, {}) == "Config{inner: Config, train: True}"


def test_shardings_are_part_of_a_key():
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        keys = {
            key_of(auto(sharding=PartitionSpec(*axes)).place((PARAMS, X), {}))
            for axes in (("data",), (None, "data"))
        }
    assert len(keys) == 2


def test_an_unpickled_layer_has_the_same_text():
    layer = nn.LayerNorm(epsilon=1e-5)
    for each in (nn.LayerNorm(), layer, nn.BatchNorm(momentum=0.9)):
        assert module_text(pickle.loads(pickle.dumps(each))) == module_text(each)
    assert module_text(layer) != module_text(nn.LayerNorm())


def test_settings_of_numpy_are_part_of_a_key():
    texts = [value_text(np.array(x), {}) for x in (["a", "b"], 1.5, None)]
    assert texts == ["<U1[2]", "float32[]", "object[]"]
    assert value_text(np.str_("relu"), {}) == "<U4[]"


def test_layers_take_their_options_from_a_table(key, monkeypatch):
    taken_by(monkeypatch, FOLD)
    linen = tdjax.linen.TimeDistributed(nn.Dense(3), method="auto")
    variables = linen.init(key, X)
    of_linen = tdjax.linen.autotune(linen, variables, X, **QUICK)
    nnx_layer = tdjax.nnx.TimeDistributed(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), method="auto"
    )
    of_nnx = tdjax.nnx.autotune(nnx_layer, X, **QUICK)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return tdjax.linen.TimeDistributed(nn.Dense(3), method="auto", name="a")(x)

    in_model = {"params": {"a": variables["params"]}}
    with of_linen | of_nnx:
        assert "18,4" in program(linen.apply, variables, X)
        assert "18,4" in program(Model().apply, in_model, X)
        assert "18,4" in program(nnx_layer, X)
    assert "18,4" not in program(Model().apply, in_model, X)


def test_auto_chooses_the_other_options_too(user_errors):
    with pytest.raises(ValueError, match=r"method='auto' chooses .* chunk_size=3"):
        auto(chunk_size=3)
    named = auto(axis_name="time")
    assert_trees_close(named(PARAMS, X), tdjax.dense(PARAMS, X))


# Files that grow


SHORT = {"budget": 1}


def test_a_miss_is_tuned_while_tracing_and_kept(tmp_path):
    path = tmp_path / "some" / "table.json"
    with tdjax.tuning(path, **SHORT):
        y = jax.jit(auto())(PARAMS, X)
    assert_trees_close(y, tdjax.dense(PARAMS, X))
    known = tdjax.Tuning.from_json(path.read_text())
    (place,) = known.places.values()
    assert place.about["argnums"] == [0, 1]
    before = path.read_text()
    with tdjax.tuning(path, **SHORT), warnings.catch_warnings():
        jax.jit(auto())(PARAMS, X)
    assert path.read_text() == before
    with tdjax.tuning(path, gradient=False, **SHORT):
        jax.grad(lambda p: auto()(p, X[:, :3]).sum())(PARAMS)
    assert len(tdjax.Tuning.from_json(path.read_text()).places) == 2


def test_fold_is_shown_while_tracing_as_it_is_outside(tmp_path):
    @tdjax.time_distributed(method="auto")
    def over_time(x):
        # Each of them makes constants of the batch's size, here or in its derivative.
        x = jnp.where(x > 0, jax.nn.relu(x), 0.0) + jnp.zeros((x.shape[0], 1))
        return jax.lax.scan(lambda c, _: (c + x, None), jnp.zeros_like(x), None, 2)[0]

    file = tmp_path / "table.json"
    with tdjax.tuning(file, budget=5):
        jax.jit(over_time)(X)
    (place,) = tdjax.Tuning.from_json(file.read_text()).places.values()
    folds = [c.verdict for c in place.candidates if c.options == FOLD]
    assert folds in (["measured"], ["behind"])


def test_a_file_that_was_deleted_is_made_again(tmp_path):
    path, run = tmp_path / "table.json", jax.jit(auto())
    for _ in range(2):
        with tdjax.tuning(path, **SHORT):
            run(PARAMS, X)
        assert path.exists()
        path.unlink()


def test_what_was_finished_meanwhile_is_kept(tmp_path):
    make = lambda finished, chunk: tdjax.Tuning(
        None,
        [Candidate(Lowering(chunk_size=chunk), verdict="measured", run_seconds=1.0, ratio=1.0)],
        {}, finished=finished, name="dense", key="a key",
    )  # fmt: skip
    path = tmp_path / "table.json"
    for finished, chunk in ((True, 2), (False, 3), (True, 4)):
        assert on_miss._add(path, make(finished, chunk), make(finished, chunk))
        kept = tdjax.Tuning.from_json(path.read_text()).options_by_key()["a key"]
        assert kept["chunk_size"] == (2 if chunk == 3 else chunk)


def test_a_file_that_cannot_be_written_is_the_same_program(tmp_path, monkeypatch):
    monkeypatch.setattr(on_miss, "_add", lambda *args: False)
    run, traces = jax.jit(lambda p, x: traces.append(1) or auto()(p, x)), []
    for _ in range(2):
        with tdjax.tuning(tmp_path / "table.json", **SHORT):
            run(PARAMS, X)
    assert len(traces) == 1


def test_an_unfinished_place_is_gone_on_with_in_the_next_process(tmp_path, monkeypatch):
    path, run = tmp_path / "table.json", lambda: jax.jit(lambda: auto()(PARAMS, X))()
    with tdjax.tuning(path, budget=0.01):
        run()
    place = lambda: next(iter(tdjax.Tuning.from_json(path.read_text()).places.values()))
    tried = lambda: sum(not c.is_left for c in place().candidates)
    assert not place().finished
    before = tried()
    with tdjax.tuning(path, budget=0.01):
        run()
    assert tried() == before
    monkeypatch.setattr(on_miss, "_tuned_here", set())
    with tdjax.tuning(path, budget=0.01):
        run()
    assert tried() > before


def test_ctrl_c_ends_the_program_and_keeps_what_is_known(tmp_path, monkeypatch):
    path, tune = tmp_path / "table.json", on_miss.tune

    def interrupted(place, make, settings, earlier):
        settings.interrupted.set()
        return tune(place, make, settings, earlier)

    monkeypatch.setattr(on_miss, "tune", interrupted)
    with tdjax.tuning(path, budget=1):
        with pytest.raises(KeyboardInterrupt):
            jax.jit(auto())(PARAMS, X)
        jax.jit(auto())(PARAMS, X)
    assert tdjax.Tuning.from_json(path.read_text()).places


def test_numbers_of_numpy_have_the_key_of_what_they_become():
    x = np.asarray(X, np.float64)
    assert tdjax.autotune(auto(), PARAMS, x, **QUICK).key == key_of(
        auto().place((PARAMS, X), {})
    )


def test_the_same_file_is_the_same_program_to_jit(tmp_path):
    path = tmp_path / "t.json"
    run = jax.jit(auto())
    for _ in range(3):
        with tdjax.tuning(path, **SHORT):
            run(PARAMS, X)
    assert run._cache_size() == 1
    with tdjax.tuning(tmp_path / "other.json", **SHORT):
        run(PARAMS, X)
    assert run._cache_size() == 2


def closes_over_a_tracer():
    step = lambda w, x: tdjax.time_distributed(lambda x: x @ w, method="auto")(x)
    return jax.jit(step)(PARAMS["kernel"], X)


def names_an_outer_axis():
    centered = lambda x: x - jax.lax.pmean(x, "outer")
    step = tdjax.time_distributed(centered, method="auto")
    return jax.vmap(step, axis_name="outer")(jnp.stack([X, 2 * X]))


def has_no_steps():
    return auto()(PARAMS, X[:, :0])


def without_jit():
    with jax.disable_jit():
        return auto()(PARAMS, X)


def of_any_batch():
    batch, time = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((batch, time, X.shape[-1]), X.dtype)
    return jax.export.export(jax.jit(auto()))(PARAMS, x).call(PARAMS, X)


@pytest.mark.parametrize(
    "call",
    [
        closes_over_a_tracer,
        names_an_outer_axis,
        has_no_steps,
        without_jit,
        of_any_batch,
    ],
)
def test_what_cannot_be_tuned_by_itself_runs_as_without_a_table(tmp_path, call):
    want = call()
    with tdjax.tuning(tmp_path / "t.json", **SHORT):
        with pytest.warns(UserWarning, match="can't be tuned by itself"):
            got = call()
        # It is said once.
        with warnings.catch_warnings():
            call()
    assert_trees_close(got, want)


def test_a_fold_inside_is_not_taken_for_the_one_that_is_shown(monkeypatch):
    inner = tdjax.time_distributed(jnp.sin, method="fold")

    def mixes(x):
        y = inner(x)
        return y - y.mean(0), jnp.ones(())

    x = normal(0, 4, 6, 5, 3)
    outer = tdjax.time_distributed(mixes, method="auto", out_axes=(1, None))
    table = {key_of(outer.place((x,), {})): FOLD}
    with in_effect(table), pytest.warns(UserWarning, match="rest of the batch"):
        got, _ = outer(x)
    want, _ = tdjax.time_distributed(mixes, out_axes=(1, None))(x)
    assert_trees_close(got, want)


def test_layers_inside_of_scan_and_grad_are_tuned_too(tmp_path, key):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            layer = tdjax.linen.TimeDistributed(nn.Dense(4), method="auto")
            return x + layer(x), None

    blocks = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )()
    variables = blocks.init(key, X, None)
    loss = lambda v: jnp.sum(blocks.apply(v, X, None)[0] ** 2)
    want = jax.grad(loss)(variables)
    with tdjax.tuning(tmp_path / "t.json", **SHORT):
        got = jax.jit(jax.grad(loss))(variables)
    assert_trees_close(got, want, 1e-4, 1e-4)
    assert len(tdjax.Tuning.from_json((tmp_path / "t.json").read_text()).places) == 1


def test_threads_share_a_file_and_lose_nothing(tmp_path):
    path, failures = tmp_path / "t.json", []

    def trace(steps):
        try:
            with tdjax.tuning(path, **SHORT):
                auto()(PARAMS, normal(0, 2, steps, 4))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=trace, args=(n,)) for n in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with tdjax.tuning(path, **SHORT):
        auto()(PARAMS, normal(0, 2, 4, 4))
    assert len(json.loads(path.read_text())["places"]) == 3


def _add(path, number):
    """Twenty places, one after the other, as a process finds them."""
    measured = Candidate(
        Lowering(), verdict="measured", run_seconds=1.0, ratio=1.0, deviation=0.0
    )
    known = tdjax.Tuning(None, [], {})
    for i in range(20):
        name = f"place {i} of {number}"
        result = tdjax.Tuning(None, [measured], {}, name=name, key=name)
        known = known | result
        on_miss._add(path, result, known)


@pytest.mark.slow
def test_processes_share_a_file_and_lose_nothing(tmp_path):
    path, context = tmp_path / "t.json", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(json.loads(path.read_text())["places"]) == 60


def test_a_damaged_file_is_an_error_before_any_work(tmp_path, user_errors):
    path = tmp_path / "t.json"
    for text in ("", "{}", "[1]", '{"places": 3}', "\0"):
        path.write_text(text)
        refused = pytest.raises(ValueError, match="path must be a file that")
        with refused, tdjax.tuning(path):
            pass
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="path must be a file"), tdjax.tuning(path):
        pass
    for error, message, context in (
        (ValueError, "of a file, got the folder", lambda: tdjax.tuning(tmp_path)),
        (TypeError, "path must be that of a file", lambda: tdjax.tuning(3)),
        (TypeError, "path must be that of a file", lambda: tdjax.tuning("")),
        (TypeError, "path must be that of a file", lambda: tdjax.tuning("a\0b")),
        (ValueError, "budget must be positive", lambda: tdjax.tuning(path, budget=0)),
        (TypeError, "gradient must be a bool", lambda: tdjax.tuning(path, gradient=1)),
    ):
        with pytest.raises(error, match=message), context():
            pass


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "t.json"
    with (
        tdjax.tuning(path, **SHORT),
        pytest.warns(UserWarning, match="can't be written") as warned,
    ):
        y = auto()(PARAMS, X)
    assert [each.filename for each in warned] == [__file__]  # The user's line.
    assert_trees_close(y, tdjax.dense(PARAMS, X))
