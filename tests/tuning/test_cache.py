"""The folder of results: what is found again, and what it survives."""

import json
import multiprocessing
import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest

import tdjax
from helpers import assert_trees_close
from tdjax._steps.lowering import Lowering
from tdjax._tuning import cache, programs, rounds, search
from tdjax._tuning.candidates import Candidate
from tdjax._tuning.result import Tuning
from tuning.tuned_dense import QUICK, X, tune_dense


def test_results_are_found_again_for_the_same_question_only(params, tmp_path):
    folder = tmp_path / "some" / "cache"
    first = tune_dense(params, cache=folder)
    again = tune_dense(params, cache=folder)
    assert not first.from_cache
    assert again.from_cache
    assert again.candidates == first.candidates
    assert again.options == first.options
    assert_trees_close(again.tuned(params, X), tdjax.dense(params, X))
    gradient = tune_dense(params, cache=folder, argnums=0)
    other = tdjax.autotune(jnp.sin, X, cache=folder, **QUICK)
    longer = tdjax.autotune(jnp.sin, jnp.tile(X, (1, 2, 1)), cache=folder, **QUICK)
    assert not any(each.from_cache for each in (gradient, other, longer))
    assert tune_dense(params, cache=folder).from_cache
    assert len(list(folder.iterdir())) == 4


def test_an_entry_is_a_saved_result(params, tmp_path):
    result = tune_dense(params, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    assert Tuning.from_json(entry.read_text()).candidates == result.candidates


def damage(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "binary": lambda path: path.write_bytes(b"\xff\x00\x80"),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text('{"entries": []}'),
    "a list": lambda path: path.write_text("[1, 2]"),
    "deep": lambda path: path.write_text("[" * 10**5),
    "no options": lambda path: damage(
        path, lambda e: e["candidates"][0].pop("options")
    ),
    "bad method": lambda path: damage(
        path, lambda e: e["candidates"][0]["options"].update(method="magic")
    ),
    "bad time": lambda path: damage(
        path, lambda e: e["candidates"][0].update(run_seconds="quick")
    ),
    "negative": lambda path: damage(
        path, lambda e: e["candidates"][0].update(run_seconds=-1.0)
    ),
    "a bool": lambda path: damage(
        path, lambda e: e["candidates"][0].update(run_seconds=True)
    ),
    "NaN": lambda path: damage(
        path, lambda e: e["candidates"][0].update(run_seconds=float("nan"))
    ),
    "huge": lambda path: damage(
        path, lambda e: e["candidates"][0].update(run_seconds=10**400)
    ),
    "other": lambda path: damage(path, lambda e: e["about"].update(jax="0.0")),
    "nothing measured": lambda path: damage(path, lambda e: e["candidates"].clear()),
    "no entry": lambda path: damage(path, lambda e: e.pop("candidates")),
}


@pytest.fixture
def entry(params, tmp_path):
    tune_dense(params, candidates=[], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    return path


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_entry_is_ignored_with_a_warning(params, entry, name):
    DAMAGES[name](entry)
    short = {"candidates": [], "cache": entry.parent}
    with pytest.warns(UserWarning, match=r"cache entry '.*json' is ignored: "):
        result = tune_dense(params, **short)
    assert not result.from_cache
    assert tune_dense(params, **short).from_cache  # it has been mended


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "folder", "loop"])
def test_what_is_no_entry_neither_hangs_nor_fills_the_memory(params, entry, kind):
    entry.unlink()
    if kind == "pipe":
        os.mkfifo(entry)
    elif kind == "device":
        entry.symlink_to("/dev/zero")
    elif kind == "large":
        entry.touch()
        os.truncate(entry, 2**40)
    elif kind == "loop":
        entry.symlink_to(entry)
    else:
        entry.mkdir()
    with pytest.warns(UserWarning, match="The cache entry") as warned:
        result = tune_dense(params, candidates=[], cache=entry.parent)
    assert "is ignored: " in str(warned[0].message)
    assert ("it is " in str(warned[0].message)) == (kind != "loop")
    assert result.best.measured
    assert entry.is_dir() == (kind == "folder")


def test_a_file_as_cache_is_refused_before_any_work(params, tmp_path, user_errors):
    file = tmp_path / "cache.json"
    file.write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    link = tmp_path / "link"
    link.symlink_to(file)
    for path in (file, tmp_path / "pipe", link):
        with pytest.raises(ValueError, match=r"cache must be a folder.*Give another"):
            tune_dense(params, cache=path)
    assert file.read_text() == "{}"
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_to_a_folder_is_followed(params, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tune_dense(params, candidates=[], cache=tmp_path / "link")
    assert tune_dense(params, candidates=[], cache=tmp_path / "real").from_cache


def test_a_folder_that_cannot_be_made_is_no_crash_of_the_search(params, tmp_path):
    nowhere = tmp_path / "nowhere"
    nowhere.symlink_to(tmp_path / "missing" / "target")
    with pytest.warns(UserWarning, match="can't be written"):
        result = tune_dense(params, candidates=[], cache=nowhere)
    assert result.best.measured


def stored(about):
    candidate = Candidate(
        Lowering(),
        verdict="measured",
        compile_seconds=1.0,
        run_seconds=1.0,
        ratio=1.0,
        temporary_bytes=0,
        deviation=0.0,
    )
    return Tuning(None, [candidate], about)


def _store(folder, number):
    for i in range(20):
        cache.store(folder, stored({"process": number, "entry": i}))
        cache.store(folder, stored({"entry": i}))


@pytest.mark.slow
def test_processes_share_a_folder_and_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_store, args=(tmp_path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    for i in range(20):
        assert cache.load(tmp_path, {"entry": i})
        for number in range(3):
            assert cache.load(tmp_path, {"process": number, "entry": i})
    assert len(list(tmp_path.iterdir())) == 80


def _store_for_ever(folder):
    while True:
        cache.store(folder, stored({"entry": 0, "padding": "x" * 10**6}))


def test_a_killed_writer_leaves_no_damaged_entry(tmp_path):
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=_store_for_ever, args=(tmp_path,))
    writer.start()
    while not list(tmp_path.glob("*.json")):
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert cache.load(tmp_path, {"entry": 0, "padding": "x" * 10**6})


FOLD = {"budget": 60, "candidates": [{"method": "fold"}]}


def make_fold_win(folder):
    (entry,) = folder.iterdir()
    wins = {"verdict": "measured", "run_seconds": 1e-9, "ratio": 1e-9}
    wins["best_ratio"] = 1e-9
    wins["ratio_spread"] = [1e-9, 1e-9]
    damage(entry, lambda e: e["candidates"][1].update(wins))


def test_what_comes_out_of_the_cache_is_compared_with_the_reference(
    tmp_path, monkeypatch
):
    """Of two functions with one program, the second may not take the first's fold."""
    # Of a callback, nothing can be shown.
    monkeypatch.setattr(programs, "find_mixing", lambda *fold: None)
    calls = [lambda x: 2 * x, lambda x: x - x.mean(0)]

    def called(number):
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        host = lambda x: calls[number](x)
        return lambda x: jax.pure_callback(host, shape(x), x, vmap_method="sequential")

    first = tdjax.autotune(called(0), X, cache=tmp_path, **FOLD)
    make_fold_win(tmp_path)
    again = tdjax.autotune(called(0), X, cache=tmp_path, **FOLD)
    assert again.options["method"] == "fold"
    second = tdjax.autotune(called(1), X, cache=tmp_path, **FOLD)
    assert first.about == second.about
    assert not second.from_cache
    assert second.options["method"] == "vmap"


def test_fold_from_the_cache_is_shown_to_be_right_again(tmp_path, monkeypatch):
    """An entry that another version has made, say."""
    fun = lambda x: x + 0.0 * x.mean(0)
    monkeypatch.setattr(programs, "find_mixing", lambda *fold: None)
    tdjax.autotune(fun, X, cache=tmp_path, **FOLD)
    make_fold_win(tmp_path)
    found = tdjax.autotune(fun, X, cache=tmp_path, **FOLD)
    assert found.options["method"] == "fold"
    monkeypatch.undo()
    again = tdjax.autotune(fun, X, cache=tmp_path, **FOLD)
    assert not again.from_cache
    assert again.options["method"] == "vmap"


def test_a_result_whose_reference_needed_chunks_is_found_again(tmp_path, monkeypatch):
    finish_really = search._finish

    def finish(trial, state):
        size = 100 * (trial.candidate.lowering.chunk_size or 10**6)
        with monkeypatch.context() as patch:
            patch.setattr(search, "temporary_bytes", lambda program: size)
            finish_really(trial, state)

    monkeypatch.setattr(search, "_finish", finish)
    options = {"memory_limit": 1000, "cache": tmp_path, **QUICK}
    for found in (False, True):
        result = tdjax.autotune(jnp.sin, X, **options)
        assert result.from_cache == found
        assert result.candidates[0].verdict == "over the memory limit"
        assert result.best.measured


def test_an_unfinished_search_goes_on_at_the_next_call(tmp_path, params):
    listing = [{"chunk_size": size} for size in (1, 2, 3, 4, 5)]
    options = {"cache": tmp_path, "candidates": listing}
    first = tune_dense(params, **options, budget=1e-6)
    assert not first.finished
    assert sum(c.is_left for c in first.candidates) == 5
    assert "5 more were not tried" in str(first.__rich__().caption)
    tried = [5]
    while tried[-1]:
        result = tune_dense(params, **options, budget=1e-6)
        assert not result.from_cache
        tried.append(sum(c.is_left for c in result.candidates))
        assert tried[-1] < tried[-2]
    last = tune_dense(params, **options, budget=60)
    assert last.finished
    assert [c.options for c in last.candidates] == [c.options for c in first.candidates]
    assert tune_dense(params, **options, budget=60).from_cache


def test_what_was_left_out_for_lack_of_time_is_compared_at_the_next_call(
    tmp_path, params, monkeypatch
):
    keep = rounds.Race._keep_what_can_run_alone

    def cut(self):
        self._cut(self.contenders[-1])
        keep(self)

    listing = [{"chunk_size": size} for size in (1, 5)]
    options = {"cache": tmp_path, "candidates": listing, "budget": 60}
    with monkeypatch.context() as patch:
        patch.setattr(rounds.Race, "_keep_what_can_run_alone", cut)
        first = tune_dense(params, **options)
    assert not first.finished
    (left,) = (i for i, c in enumerate(first.candidates) if not c.rounds)
    assert first.candidates[left].verdict == "measured"
    again = tune_dense(params, **options)
    assert again.finished
    assert again.candidates[left].rounds or again.candidates[left].verdict == "behind"


def test_arrays_that_a_function_closes_over_are_part_of_the_key(tmp_path):
    options = {"cache": tmp_path, **QUICK}
    scaled = lambda w: lambda x: x * w
    inner = lambda w: jax.jit(lambda x: x * w)
    for make in (scaled, inner):
        one, two = jnp.full(X.shape[-1], 1.0), jnp.full(X.shape[-1], 2.0)
        assert not tdjax.autotune(make(one), X, **options).from_cache
        assert tdjax.autotune(make(one), X, **options).from_cache
        assert not tdjax.autotune(make(two), X, **options).from_cache


def test_an_entry_without_a_reference_is_measured_again(params, entry):
    damage(entry, lambda e: e["candidates"][0]["options"].update(method="fold"))
    damage(entry, lambda e: e["about"]["candidates"][0].update(method="fold"))
    with pytest.warns(UserWarning, match="is ignored"):
        assert not tune_dense(params, candidates=[], cache=entry.parent).from_cache
    assert (
        search.find_reference([Candidate(Lowering("fold"), verdict="measured")]) is None
    )


def test_a_derivative_is_part_of_the_key(tmp_path):
    def make(scale):
        double = jax.custom_vjp(lambda x: 2 * x)
        double.defvjp(lambda x: (2 * x, None), lambda _, g: (scale * g,))
        return double

    options = {"candidates": [], "cache": tmp_path, "argnums": 0}
    assert not tdjax.autotune(make(2), X, **options).from_cache
    assert not tdjax.autotune(make(3), X, **options).from_cache
    assert tdjax.autotune(make(2), X, **options).from_cache
