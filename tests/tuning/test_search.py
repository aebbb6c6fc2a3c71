"""The search on a made-up clock: how often each candidate is timed, and what counts."""

import collections

import jax
import jax.numpy as jnp
import pytest

import tdjax
from tdjax._steps.lowering import Lowering
from tdjax._tuning import search
from tdjax._tuning.candidates import Candidate, default_tolerance
from tuning.tuned_dense import QUICK, X, tune_dense


@pytest.fixture
def clock(monkeypatch):
    """Replaces times by `seconds[chunk_size](number of the measurement)`."""
    seconds, measured = {}, collections.Counter()
    compile_really = search.compile_candidate

    def compile_candidate(candidate, run, args, mixing):
        program, reason = compile_really(candidate, run, args, mixing)
        return (candidate.lowering.chunk_size, program), reason

    def timed(program, args, calls=1):
        size, run = program
        measured[size] += 1
        return seconds[size](measured[size]), run(*args)

    monkeypatch.setattr(search, "compile_candidate", compile_candidate)
    monkeypatch.setattr(search, "timed", timed)
    return seconds, measured


def tune(sizes, **options):
    candidates = [{"chunk_size": size} for size in sizes if size]
    options = {"budget": 600.0, "candidates": candidates, **options}
    result = tdjax.autotune(jnp.sin, X, **options)
    return {each.lowering.chunk_size: each for each in result.candidates}


def test_a_slow_candidate_is_measured_less_often(clock):
    seconds, measured = clock
    for size, length in {None: 0.001, 2: 0.0012, 1: 0.02}.items():
        seconds[size] = lambda i, length=length: length
    result = tdjax.autotune(lambda x: jnp.tanh(x * 2.0), X, **QUICK)
    assert {str(each): each.verdict for each in result.candidates} == {
        "method='vmap'": "measured",
        "method='fold'": "measured",
        "method='vmap', chunk_size=2": "behind",
        "method='vmap', chunk_size=1": "behind",
    }
    # The first run, and a few more; then it is 20 times behind.
    assert measured[1] <= 4 < measured[2] < measured[None] / 2
    assert result.options["chunk_size"] is None


@pytest.mark.parametrize(
    ("seconds", "median", "spread"),
    [([0.9], 0.9, None), ([0.9, 0.4], 0.4, None), ([0.9, 0.4, 0.6], 0.5, (0.45, 0.55))],
)
def test_the_first_measurement_is_left_out_of_the_median(seconds, median, spread):
    candidate = Candidate(Lowering())
    search._summarise(search._Contender(candidate, None, seconds))
    assert candidate.run_seconds == pytest.approx(median)
    assert candidate.spread == (spread and pytest.approx(spread))


def test_what_is_far_behind_is_dropped_in_the_first_rounds(clock):
    seconds, measured = clock
    # The two runs before the rounds hide it.
    seconds.update({None: lambda i: 0.1, 2: lambda i: 0.1 if i <= 4 else 0.16})
    by_size = tune([2])
    assert by_size[2].verdict == "behind"
    assert measured[2] == 4 + 2
    assert by_size[None].measured


def test_what_is_a_little_behind_is_dropped_later(clock):
    seconds, measured = clock
    seconds.update({None: lambda i: 0.1, 2: lambda i: 0.1 if i <= 4 else 0.12})
    assert tune([2])[2].verdict == "behind"
    assert measured[2] == 4 + 5


@pytest.mark.parametrize(("length", "runs"), [(0.1, 4), (60.0, 2), (600.0, 1)])
def test_a_run_is_repeated_before_the_rounds_if_it_is_short(clock, length, runs):
    seconds, measured = clock
    seconds[None] = lambda i: length
    limits = search.Limits(2500.0)
    state = search._Search(lambda lowering: jnp.sin, (X,), limits)
    search._try(Candidate(Lowering()), state)
    assert measured[None] == runs


def test_matrix_units_round_more_than_a_cpu(monkeypatch):
    assert default_tolerance(jnp.float32) == 2e-4
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_tolerance(jnp.float32) == 3e-2
    assert default_tolerance(jnp.complex64) == 3e-2
    assert default_tolerance(jnp.bfloat16) == 3e-2
    assert default_tolerance(jnp.float16) == 5e-3
    assert default_tolerance(jnp.int32) == 0


def test_the_number_of_cores_is_part_of_the_key(params, tmp_path, monkeypatch):
    options = {"candidates": [], "cache": tmp_path}
    for cores in (2, 64):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert not tune_dense(params, **options).from_cache
        assert tune_dense(params, **options).from_cache
