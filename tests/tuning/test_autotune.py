"""The tuner: what it refuses, what it keeps, and what it can be trusted with."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdjax
from helpers import assert_trees_close, normal
from tuning.tuned_dense import QUICK, X, tune_dense

OTHER = "other numbers than the reference"
MIXES = "may depend on the rest of the batch: reduce_sum"


def scale(x):
    return jnp.tanh(x * 2.0)


def verdicts(result):
    return {str(each): each.verdict for each in result.candidates}


@pytest.mark.parametrize("argnums", [None, 0, (0, 1)])
def test_the_tuned_function_gives_what_the_plain_one_gives(params, argnums):
    result = tune_dense(params, argnums=argnums)
    assert_trees_close(result.tuned(params, X), tdjax.dense(params, X))
    assert result.best in result.candidates
    assert result.best.measured
    assert set(result.options) == {"method", "chunk_size", "unroll", "remat"}
    measured = [each for each in result.candidates if each.measured]
    for each in measured:
        assert each.run_seconds > 0
        assert each.compile_seconds > 0
        assert each.temporary_bytes >= 0
        assert each.deviation < 1e-4
        assert each.ratio > 0
    fastest = min(each.ratio for each in measured)
    assert result.best.is_default or result.best.ratio <= 1.03 * fastest


def test_a_lowering_that_gives_other_numbers_is_refused_and_said_so():
    mixes_the_batch = lambda x: x - jnp.mean(x, axis=0)
    result = tdjax.autotune(mixes_the_batch, X, **QUICK)
    refused = verdicts(result)["method='fold'"]
    assert refused == "other numbers than the reference"
    assert result.options["method"] == "vmap"
    fold = next(c for c in result.candidates if c.options["method"] == "fold")
    assert fold.deviation > 0.1
    assert fold.run_seconds is None


def test_equal_numbers_are_not_enough():
    mixes_the_batch = lambda x: x - jnp.mean(x, axis=0)
    result = tdjax.autotune(mixes_the_batch, jnp.ones_like(X), **QUICK)
    assert verdicts(result)["method='fold'"] == MIXES
    content = json.loads(result.to_json())
    assert content["candidates"][1]["deviation"] == 0


def test_an_infinite_deviation_is_null_in_json():
    result = tdjax.autotune(
        lambda x: x - x[:1], jnp.arange(24).reshape(2, 4, 3), **QUICK
    )
    assert result.candidates[1].deviation == float("inf")
    assert json.loads(result.to_json())["candidates"][1]["deviation"] is None


def test_the_modules_own_options_are_among_the_candidates(key):
    module = tdjax.linen.TimeDistributed(nn.Dense(3), method="fold", chunk_size=5)
    variables = module.init(key, X)
    result = tdjax.linen.autotune(module, variables, X, **QUICK)
    assert str(result.candidates[1]) == "method='fold', chunk_size=5"


def test_straight_lines_and_loops_have_different_names(params):
    listing = [{"chunk_size": 3, "unroll": True}, {"chunk_size": 3, "unroll": 1}]
    names = [str(c) for c in tune_dense(params, candidates=listing).candidates]
    assert names[1:] == [
        "method='vmap', chunk_size=3, unroll=True",
        "method='vmap', chunk_size=3",
    ]


def test_a_gradient_that_differs_is_refused_though_the_output_agrees():
    @jax.custom_vjp
    def fun(x):
        return x

    # Right for the examples of one step, and not for those of all steps.
    fun.defvjp(lambda x: (x, x), lambda x, ct: (ct * x.shape[0],))
    forward = tdjax.autotune(fun, X, **QUICK)
    both = tdjax.autotune(fun, X, argnums=0, **QUICK)
    assert verdicts(forward)["method='fold'"] == MIXES.replace(
        "reduce_sum", "a derivative"
    )
    assert verdicts(both)["method='fold'"] == "other numbers than the reference"


def test_nan_where_the_reference_has_none_is_refused():
    # More than three examples make it NaN.
    fun = lambda x: jnp.where(x.shape[0] > 3, jnp.nan, x)
    result = tdjax.autotune(fun, X, **QUICK)
    assert verdicts(result)["method='fold'"] == "other numbers than the reference"
    nans = tdjax.autotune(lambda x: jnp.where(x > 0, jnp.nan, x), X, **QUICK)
    assert verdicts(nans)["method='fold'"] in ("measured", "behind")


def test_what_cannot_be_lowered_is_listed_with_its_error():
    result = tdjax.autotune(scale, X[0, :, 0], in_axes=0, out_axes=0, **QUICK)
    assert (
        "failed: ValueError: method='fold' needs a batch axis"
        in (verdicts(result)["method='fold'"])
    )


def test_what_fun_itself_raises_is_raised():
    with pytest.raises(TypeError, match="dot_general requires"):
        tdjax.autotune(lambda x: x @ jnp.ones((7, 7)), X, **QUICK)


@pytest.mark.slow
def test_a_memory_limit_is_kept_and_one_that_cannot_be_is_an_error():
    fun = lambda x: jnp.sum(jnp.exp(jnp.sin(x)[:, :, None] * x[:, None]), (1, 2))
    x = normal(1, 4, 8, 128)
    whole, *_ = tdjax.autotune(fun, x, argnums=0, **QUICK).candidates
    limit = int(0.7 * whole.temporary_bytes)
    limited = {"argnums": 0, "memory_limit": limit, "budget": 60.0}
    result = tdjax.autotune(fun, x, **limited)
    assert verdicts(result)["method='vmap'"] == "over the memory limit"
    assert result.best.temporary_bytes <= limit
    assert_trees_close(result.tuned(x), jax.vmap(fun, 1, 1)(x))
    with pytest.raises(ValueError, match=r"memory_limit=1 .* the least was \d+ bytes"):
        tdjax.autotune(fun, x, argnums=0, memory_limit=1, **QUICK)


def test_the_default_list_covers_methods_chunks_loops_and_remat(params):
    result = tune_dense(params, argnums=0, candidates=None)
    listed = [each.options for each in result.candidates]
    for name, values in {
        "method": {"vmap", "fold"},
        "chunk_size": {None, 1, 3},
        "unroll": {1},
        "remat": {False, True},
    }.items():
        assert {options[name] for options in listed} == values
    assert len({str(options) for options in listed}) == len(listed)


def test_no_time_left_is_a_verdict_and_the_reference_is_always_measured(params):
    result = tune_dense(params, budget=1e-6)
    first, *rest = result.candidates
    assert first.measured
    assert rest
    assert {each.verdict for each in rest} == {"no time left"}
    assert result.options == first.options


def test_candidates_can_be_chosen(params):
    listing = [{"chunk_size": 2}, {"method": "fold", "chunk_size": 4, "unroll": 2}]
    result = tune_dense(params, candidates=listing)
    assert [each.options["chunk_size"] for each in result.candidates] == [None, 2, 4]
    assert result.candidates[2].options["unroll"] == 2
    assert [each.blocks for each in result.candidates] == [1, 3, 2]
    assert str(result.candidates[2]) == "method='fold', chunk_size=4, unroll=2"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be positive, got 0"),
        ({"budget": "fast"}, TypeError, "budget must be a number, got str"),
        ({"memory_limit": -1}, ValueError, "memory_limit must be positive, got -1"),
        ({"tolerance": True}, TypeError, "tolerance must be a number, got bool"),
        ({"budget": float("inf")}, ValueError, "budget must be finite"),
        ({"budget": 10**5000}, ValueError, "budget must be finite"),
        ({"budget": -(10**5000)}, ValueError, "budget must be finite"),
        ({"budget": float("nan")}, ValueError, "budget must be positive, got nan"),
        ({"tolerance": float("inf")}, ValueError, "tolerance must be finite"),
        ({"tolerance": 10**400}, ValueError, "tolerance must be finite"),
        ({"argnums": 2}, ValueError, r"argnums .* 2 argument\(s\), such as 0, got 2"),
        ({"argnums": "x"}, TypeError, r"argnums must be positions .* got 'x'"),
        ({"candidates": [{"method": "scan"}]}, ValueError, "method must be one of"),
        ({"candidates": {"chunk_size": 2}}, TypeError, "candidates must be a list of"),
        (
            {"candidates": [{"speed": 1}]},
            TypeError,
            r"candidates .* unroll.* got .*speed",
        ),
        (
            {"candidates": ["fold"]},
            TypeError,
            "candidates must be mappings .* got 'fold'",
        ),
        ({"argnums": ()}, ValueError, "argnums must name an argument"),
        ({"cache": ""}, TypeError, "cache must be the path of a folder, got ''"),
        ({"cache": "a\0b"}, TypeError, "cache must be the path of a folder"),
        (
            {"compiler_options": {"fast": 1}},
            TypeError,
            "compiler_options must be a list .* got dict",
        ),
        (
            {"compiler_options": [{"fast": [1]}]},
            TypeError,
            "compiler_options must be mappings",
        ),
    ],
)
def test_bad_arguments_are_named(user_errors, params, options, error, message):
    with pytest.raises(error, match=message):
        tune_dense(params, **options)


def test_a_function_and_arrays_are_needed(user_errors, key):
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda x: tdjax.autotune(scale, x).tuned(x))(X)
    with pytest.raises(TypeError, match="must hold arrays"):
        tdjax.autotune(scale, jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(ValueError, match="argnums=0 must point at floating point"):
        tdjax.autotune(scale, jnp.ones((2, 3, 4), jnp.int32), argnums=0)
    with pytest.raises(TypeError, match=r"module must be an instance of flax.linen"):
        tdjax.linen.autotune(nn.Dense, {}, X)
    with pytest.raises(TypeError, match=r"module must be an instance of flax.nnx"):
        tdjax.nnx.autotune(nn.Dense(3), X)
    with pytest.raises(TypeError, match=r"fun must be .* Use tdjax.linen.autotune"):
        tdjax.autotune(nn.Dense(3), X)
    with pytest.raises(TypeError, match=r"Write autotune\(module, variables, x\)"):
        tdjax.linen.autotune(nn.Dense(3), X)


def test_what_is_chosen_is_not_given(user_errors, key):
    fixed = {"chunk_size": 2}
    with pytest.raises(TypeError, match=r"method is what autotune chooses, got .*fold"):
        tdjax.autotune(scale, X, method="fold")
    with pytest.raises(TypeError, match=r"chunk_size is .* candidates=\[\{...\}\]"):
        tdjax.autotune(tdjax.time_distributed(scale), X, **fixed)
    layer = nn.Dense(3)
    with pytest.raises(TypeError, match="chunk_size is what autotune chooses"):
        tdjax.linen.autotune(layer, layer.init(key, X), X, **fixed)
    with pytest.raises(TypeError, match="chunk_size is what autotune chooses"):
        tdjax.nnx.autotune(nnx.Linear(X.shape[-1], 3, rngs=nnx.Rngs(0)), X, **fixed)
    # A function may have an argument of that name.
    power = lambda x, unroll: x**unroll
    assert tdjax.autotune(power, X, unroll=2, **QUICK).best.measured


def test_some_steps_are_needed(user_errors):
    with pytest.raises(TypeError, match=r"fun must be callable, got float"):
        tdjax.autotune(1.0, X)
    with pytest.raises(ValueError, match="0 steps"):
        tdjax.autotune(scale, X[:, :0])


def test_the_table_and_the_json_have_every_candidate(params, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = tune_dense(params, budget=60.0)
    result.show()
    printed = capsys.readouterr().out
    assert "chosen" in printed
    assert printed.count("fold") == 1
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    content = json.loads(result.to_json())
    assert content["options"] == result.options
    assert len(content["candidates"]) == len(result.candidates)
    assert content["about"]["jax"] == jax.__version__


def test_a_result_can_be_saved_and_loaded(params):
    result = tune_dense(params)
    loaded = tdjax.Tuning.from_json(result.to_json())
    assert loaded.tuned is None
    assert loaded.candidates == result.candidates
    assert (loaded.options, loaded.about) == (result.options, result.about)
    assert str(loaded) == str(result)
    apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), **loaded.options)
    assert_trees_close(apply(params, X), result.tuned(params, X))


@pytest.mark.parametrize("text", ["", "[]", "{}", "1", "[" * 10**5, '{"about": NaN}'])
def test_a_text_that_is_no_result_is_refused(text):
    with pytest.raises(ValueError, match="text must be all that"):
        tdjax.Tuning.from_json(text)


def test_what_time_distributed_returned_keeps_its_options(params):
    head = tdjax.time_distributed(
        tdjax.dense, in_axes=(None, 0), out_axes=0, method="fold", chunk_size=4
    )
    result = tdjax.autotune(head, params, X, **QUICK)
    assert str(result.candidates[0]) == "method='vmap'"
    assert str(result.candidates[1]) == "method='fold', chunk_size=4"
    assert_trees_close(result.tuned(params, X), tdjax.dense(params, X))
    assert result.tuned.in_axes == (None, 0)
    assert tdjax.autotune(result.tuned, params, X, **QUICK).best.measured


def test_keywords_of_the_call_reach_the_function():
    mask = tdjax.lengths_to_mask(jnp.array([6, 2, 0]), 6)
    scaled = lambda x, factor: x * factor
    packed = tdjax.time_distributed(scaled, capacity=8)
    result = tdjax.autotune(packed, X, mask=mask, factor=3.0, **QUICK)
    got = result.tuned(X, mask=mask, factor=3.0)
    assert_trees_close(got, jnp.where(mask[..., None], X * 3, 0))
    assert [each.blocks for each in result.candidates] == [1, 1, 4, 8]


def test_options_are_not_given_twice(params):
    head = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
    with pytest.raises(ValueError, match=r"in_axes must be given to time_distributed"):
        tdjax.autotune(head, params, X, in_axes=(None, 0), **QUICK)
    with pytest.raises(ValueError, match=r"capacity must be given .* Leave them out"):
        tdjax.autotune(head, params, X, capacity=3, **QUICK)


def test_a_named_time_axis_leaves_lowerings_that_have_it():
    centred = lambda x: x - jax.lax.pmean(x, "time")
    over_time = tdjax.time_distributed(centred, axis_name="time")
    result = tdjax.autotune(over_time, X, budget=60.0)
    assert set(verdicts(result)) == {"method='vmap'"}
    assert_trees_close(result.tuned(X), X - X.mean(1, keepdims=True), 1e-5, 1e-5)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_linen_module_comes_back_tuned(key, wrapped):
    layer = nn.Conv(5, (3,))
    x = normal(0, 2, 6, 7, 4)
    module = tdjax.linen.TimeDistributed(layer)
    variables = module.init(key, x)
    result = tdjax.linen.autotune(
        module if wrapped else layer, variables, x, argnums=0, **QUICK
    )
    assert isinstance(result.tuned, tdjax.linen.TimeDistributed)
    assert result.tuned.method == result.options["method"]
    assert result.tuned.chunk_size == result.options["chunk_size"]
    assert_trees_close(result.tuned.apply(variables, x), module.apply(variables, x))


def test_linen_axes_keywords_noise_and_state_are_the_modules_own(key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    module = tdjax.linen.TimeDistributed(Layer(), in_axes=0, out_axes=0)
    x = normal(0, 6, 3, 4)
    variables = module.init(key, x, train=False)
    options = {"rngs": {"dropout": key}, "mutable": ["batch_stats"], "train": True}
    train = tdjax.linen.autotune(module, variables, x, **options, **QUICK)
    assert verdicts(train)["method='fold'"] == "other numbers than the reference"
    serve = tdjax.linen.autotune(module, variables, x, train=False, **QUICK)
    assert verdicts(serve)["method='fold'"] in ("measured", "behind")
    assert serve.tuned.in_axes == 0


def test_an_nnx_module_comes_back_tuned_around_the_same_layer():
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    module = tdjax.nnx.TimeDistributed(layer, in_axes=0, out_axes=0)
    result = tdjax.nnx.autotune(module, X, argnums=0, **QUICK)
    assert result.tuned.layer is layer
    assert result.tuned.in_axes == 0
    assert result.tuned.method == result.options["method"]
    assert_trees_close(result.tuned(X), module(X))


def test_nnx_state_is_left_alone_and_its_changes_are_compared():
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(layer)))
    result = tdjax.nnx.autotune(layer, X, **QUICK)
    assert verdicts(result)["method='fold'"] == "other numbers than the reference"
    assert_trees_close(nnx.to_pure_dict(nnx.state(layer)), before, 0, 0)
    by_x = tdjax.nnx.autotune(layer, X, argnums=1, **QUICK)
    assert by_x.best.measured
    layer.eval()
    calm = tdjax.nnx.autotune(layer, X, **QUICK)
    assert verdicts(calm)["method='fold'"] in ("measured", "behind")


def test_integers_keys_and_half_precision_are_compared_too(key):
    def fun(key, x):
        return jnp.round(x).astype(jnp.int32), x.astype(jnp.bfloat16), key

    options = {"in_axes": (None, 1), "out_axes": (1, 1, None)}
    result = tdjax.autotune(fun, key, X, argnums=1, **options, **QUICK)
    assert set(verdicts(result).values()) <= {"measured", "behind"}
    assert [each.deviation for each in result.candidates] == [0.0] * 4


@pytest.mark.slow
def test_a_sum_in_half_precision_may_be_as_far_off_as_the_reference_is():
    params = tdjax.init_dense(jax.random.key(0), 64, 64)
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    x = half(normal(0, 64, 128, 64))
    result = tdjax.autotune(
        tdjax.dense, half(params), x, in_axes=(None, 1), argnums=0, **QUICK
    )
    assert result.candidates[1].deviation > 3e-2  # a sum of 8192 in bfloat16
    assert verdicts(result)["method='fold'"] in ("measured", "behind")
    strict = {**QUICK, "argnums": 0, "tolerance": 1e-3, "in_axes": (None, 1)}
    result = tdjax.autotune(tdjax.dense, half(params), x, **strict)
    assert verdicts(result)["method='fold'"] == "other numbers than the reference"


def gate(gamma, x):
    return x + gamma * (x * 2 - jnp.mean(x * 2, axis=0))


def fold_verdict(result):
    return verdicts(result)["method='fold'"]


def test_parameters_that_are_zero_hide_no_mixing_of_the_batch():
    zero = jnp.zeros(X.shape[-1])
    shared = tdjax.autotune(gate, zero, X, in_axes=(None, 1), **QUICK)
    assert fold_verdict(shared) == MIXES
    closed = tdjax.autotune(lambda x: gate(zero, x), X, **QUICK)
    assert fold_verdict(closed) == MIXES
    inner = jax.jit(lambda x: gate(zero, x))
    assert fold_verdict(tdjax.autotune(lambda x: inner(x), X, **QUICK)) == MIXES
    looped = lambda x: jax.lax.scan(lambda c, _: (gate(zero, c), None), x, None, 2)[0]
    assert fold_verdict(tdjax.autotune(looped, X, **QUICK)) == MIXES


def test_zero_parameters_of_layers_and_equal_ids_hide_no_mixing_of_the_batch():
    class Gate(nn.Module):
        @nn.compact
        def __call__(self, x):
            return gate(self.param("gamma", nn.initializers.zeros, x.shape[-1:]), x)

    class NnxGate(nnx.Module):
        def __init__(self):
            self.gamma = nnx.Param(jnp.zeros(X.shape[-1]))

        def __call__(self, x):
            return gate(self.gamma[...], x)

    layer = tdjax.linen.TimeDistributed(Gate())
    variables = layer.init(jax.random.key(0), X)
    assert fold_verdict(tdjax.linen.autotune(layer, variables, X, **QUICK)) == MIXES
    assert fold_verdict(tdjax.nnx.autotune(NnxGate(), X, **QUICK)) == MIXES
    table = normal(3, 5, 4)
    embed = lambda ids: table[ids] - jnp.mean(table[ids], axis=0)
    for ids in (0, 4):
        same = jnp.full((4, 6), ids)
        assert fold_verdict(tdjax.autotune(embed, same, **QUICK)) in (OTHER, MIXES)


def test_closed_over_arrays_hide_no_mixing_of_the_batch():
    places = jnp.arange(3.0)
    kernel = jnp.exp(-((places[:, None] - places) ** 2) / 20)

    def fun(x):
        root = jnp.linalg.cholesky(kernel)
        solve = jax.scipy.linalg.solve_triangular
        return solve(root, x - x.mean(0), lower=True)

    result = tdjax.autotune(fun, X, candidates=[{"method": "fold"}], budget=60)
    assert fold_verdict(result) != "measured"


def test_keys_with_a_time_axis_and_devices_are_kept():
    keys = jax.random.split(jax.random.key(0), X.shape[1])
    noisy = lambda key, x: x + jax.random.normal(key, x.shape)
    result = tdjax.autotune(noisy, keys, X, in_axes=(0, 1), **QUICK)
    assert result.best.measured


ALIKE = {
    "ones": jnp.ones((4, 3, 5)),
    "one example": jnp.broadcast_to(jnp.arange(5.0), (4, 3, 5)),
    "examples repeated over time": jnp.repeat(normal(0, 4, 1, 5), 3, 1),
    "one step": normal(0, 4, 1, 5),
    "one example, one step": normal(0, 1, 1, 5),
    "NaN": jnp.full((4, 3, 5), jnp.nan),
    "NumPy": np.repeat(np.float64(normal(0, 4, 1, 5)), 3, 1),
    "ids": jnp.repeat(jnp.array([[3], [5], [1], [0]]), 3, 1),
    "bytes": jnp.full((4, 3, 2), 3, jnp.uint8),
    "bools": jnp.ones((4, 3, 2), bool),
}


@pytest.mark.parametrize("name", ALIKE)
def test_inputs_that_are_alike_hide_no_mixing_of_the_batch(name):
    mix = lambda x: x - jnp.tanh(x * 1.0).mean(0)
    fold_only = {"candidates": [{"method": "fold"}], "budget": 60.0}
    result = tdjax.autotune(mix, ALIKE[name], **fold_only)
    assert fold_verdict(result) in (OTHER, MIXES)
    assert result.options["method"] == "vmap"


def test_masks_hide_no_mixing_of_the_batch():
    mix = tdjax.time_distributed(lambda x: x - x.mean(0))
    for mask in (
        jnp.zeros(X.shape[:2], bool),
        jnp.zeros(X.shape[:2], bool).at[0, 0].set(True),
    ):
        result = tdjax.autotune(mix, X, mask=mask, **QUICK)
        assert fold_verdict(result) in (OTHER, MIXES)


@pytest.mark.parametrize("gamma", [0, False, 0.0, np.int32(0), 1e-9])
def test_shared_numbers_hide_no_mixing_of_the_batch(gamma):
    result = tdjax.autotune(gate, gamma, X, in_axes=(None, 1), **QUICK)
    assert fold_verdict(result) in (OTHER, MIXES)


def test_a_mask_that_is_added_and_other_constants_keep_fold():
    causal = jnp.where(jnp.tri(3, dtype=bool), 0.0, -1e9)
    fun = lambda x: jax.nn.softmax(x @ x.swapaxes(-1, -2) + causal) @ x
    result = tdjax.autotune(fun, normal(0, 4, 6, 3, 3), **QUICK)
    assert fold_verdict(result) in ("measured", "behind")


def test_a_model_of_functions_and_arrays_is_named(user_errors):
    model = {"weights": jnp.ones(X.shape[-1]), "activation": jnp.tanh}
    fun = lambda model, x: model["activation"](x * model["weights"])
    with pytest.raises(
        TypeError, match=r"got .* at args\[0\]\['activation'\]. Leave it"
    ):
        tdjax.autotune(fun, model, X, in_axes=(None, 1), **QUICK)
    assert tdjax.autotune(lambda x: fun(model, x), X, **QUICK).best.measured
    with pytest.raises(TypeError, match=r"args must hold .* at args\[0\]"):
        tdjax.autotune(fun, np.array(["a", "b"]), X, in_axes=(None, 1), **QUICK)
    layer = nn.Dense(3)
    variables = {**layer.init(jax.random.key(0), X), "activation": jnp.tanh}
    with pytest.raises(TypeError, match=r"variables must hold .*\['activation'\]"):
        tdjax.linen.autotune(layer, variables, X, **QUICK)


def test_what_wraps_a_function_over_time_is_refused(user_errors):
    class Head:
        @tdjax.time_distributed(in_axes=(None, 1))
        def scale(self, x):
            return 2 * x

    over_time = tdjax.time_distributed(scale)
    for fun in (
        Head().scale,
        jax.jit(over_time),
        jax.checkpoint(jax.jit(over_time)),
        functools.partial(over_time),
    ):
        with pytest.raises(ValueError, match="would map over a second time axis"):
            tdjax.autotune(fun, X, **QUICK)
    assert tdjax.autotune(jax.jit(scale), X, **QUICK).best.measured


def test_without_jit_there_is_nothing_to_measure(user_errors):
    with jax.disable_jit(), pytest.raises(ValueError, match="jax_disable_jit is on"):
        tdjax.autotune(jnp.sin, X, **QUICK)


class PackedNorm(nnx.Module):
    """BatchNorm that gets the mask of its step."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.norm(x, mask=mask[:, None])


FOLDS = [{"method": "vmap"}, {"method": "fold"}]


def test_a_layer_that_is_another_function_under_vmap_is_refused():
    x = normal(0, 4, 3, 3) + jnp.arange(3)[:, None]
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model = tdjax.nnx.TimeDistributed(norm, method="fold")
    with pytest.raises(
        ValueError, match=r"BatchNorm and Dropout .* keep .* Measured: other numbers"
    ):
        tdjax.nnx.autotune(model, x, candidates=FOLDS, budget=5)
    model.eval()
    assert tdjax.nnx.autotune(model, x, candidates=FOLDS, budget=5).tuned


def test_a_layer_that_fails_under_vmap_is_explained():
    mask = tdjax.lengths_to_mask(jnp.array([3, 1]), 3)
    model = tdjax.nnx.TimeDistributed(PackedNorm(), method="fold", capacity=4)
    with pytest.raises(ValueError, match="capacity=4") as error:
        tdjax.nnx.autotune(model, normal(0, 2, 3, 3), mask, mask=mask, budget=5)
    assert "the same function under method='vmap'" in "".join(error.value.__notes__)


def test_forgotten_inputs_are_named(key):
    layer = nn.Dense(3)
    variables = layer.init(key, X)
    wrapped = tdjax.linen.TimeDistributed(layer)
    with pytest.raises(ValueError, match="args must hold the inputs of a call"):
        tdjax.linen.autotune(wrapped, variables)
    with pytest.raises(ValueError, match="args must hold the inputs of a call"):
        tdjax.nnx.autotune(
            tdjax.nnx.TimeDistributed(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        )
