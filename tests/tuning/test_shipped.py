"""Tables that ship with the library."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import tdjax
from helpers import assert_trees_close, normal
from tdjax._jaxprs import contains
from tdjax._steps.lowering import Lowering
from tdjax._tuning import shipped
from tdjax._tuning.candidates import OPTIONS
from tdjax._tuning.table import device_kind, key_of
from tuning.tuned_dense import X

PARAMS = tdjax.init_dense(jax.random.key(0), X.shape[-1], 5)
AUTO = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), method="auto")
LOOP = {"method": "vmap", "chunk_size": 2, "unroll": 1, "remat": False}


@pytest.fixture
def ship(monkeypatch):
    """Replaces the tables by one with these options for `AUTO`."""

    def replace(options):
        table = {key_of(AUTO.place((PARAMS, X), {})): options}
        monkeypatch.setattr(shipped, "options_of", lambda device: table)

    return replace


def has_loop(run, *args):
    again = lambda *args: run(*args)  # Not the program of the call before.
    return contains(jax.make_jaxpr(again)(*args), "scan")


def test_it_is_looked_up_where_no_other_table_is(ship):
    assert not has_loop(AUTO, PARAMS, X)
    ship(LOOP)
    assert has_loop(AUTO, PARAMS, X)
    assert not has_loop(AUTO, PARAMS, X[:, :3])
    vmap = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
    assert not has_loop(vmap, PARAMS, X)


def test_it_is_for_the_platform_that_it_was_measured_on(ship):
    ship(LOOP)
    run = jax.jit(lambda params, x: AUTO(params, x))
    text = lambda *p: jax.export.export(run, platforms=p)(PARAMS, X).mlir_module()
    assert "stablehlo.while" in text("cpu")
    assert "stablehlo.while" not in text("cuda")
    assert_trees_close(run(PARAMS, X), tdjax.dense(PARAMS, X))


def test_a_table_in_effect_comes_first(ship):
    ship(LOOP)
    result = tdjax.autotune(AUTO, PARAMS, X, budget=5, candidates=[])
    with result:
        assert not has_loop(AUTO, PARAMS, X)
        # What it does not have, the shipped one may have.
        assert not has_loop(AUTO, PARAMS, X[:, :3])
    with tdjax.autotune(jnp.sin, X, budget=5, candidates=[]):
        assert has_loop(AUTO, PARAMS, X)


def test_fold_is_shown_to_be_right_here_too(ship, monkeypatch):
    ship({**LOOP, "method": "fold", "chunk_size": None})
    assert_trees_close(AUTO(PARAMS, X), tdjax.dense(PARAMS, X))
    mixing = lambda params, x: x - x.mean(0)
    other = tdjax.time_distributed(mixing, in_axes=(None, 1), method="auto")
    table = {key_of(other.place((PARAMS, X), {})): {**LOOP, "method": "fold"}}
    monkeypatch.setattr(shipped, "options_of", lambda device: table)
    with pytest.warns(UserWarning, match="rest of the batch"):
        y = other(PARAMS, X)
    assert_trees_close(y, X - X.mean(0))


def test_the_file_of_a_device():
    assert shipped.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert shipped.file_name("TPU v5 lite") == "tpu-v5-lite.json"
    assert shipped.options_of("a device without a table") == {}


def test_the_table_for_a_cpu_has_valid_options_of_this_version():
    table = shipped.options_of("cpu")
    assert len(table) > 50
    for key, options in table.items():
        assert set(options) == set(OPTIONS)
        Lowering(**options)
        assert json.loads(key)["device"] == "cpu"


@pytest.mark.skipif("device_kind() != 'cpu'")
@pytest.mark.parametrize("api", ["function", "linen"])
def test_the_table_for_a_cpu_has_the_benchmarks_shapes(api):
    x = normal(0, 8, 128, 64)
    if api == "function":
        params = tdjax.init_dense(jax.random.key(0), 64, 64)
        place = AUTO.place((params, x), {})
    else:
        model = tdjax.linen.TimeDistributed(nn.Dense(64), method="auto")
        lowering = Lowering("auto")
        place = model._place_of("__call__", (x,), {}, lowering, None, ())
    assert key_of(place) in shipped.options_of(device_kind())
