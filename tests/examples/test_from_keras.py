"""The example that comes from Keras: what it compares, its training, its way to Flax."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import _keras_comparison
import _keras_fit
import _sequences
import from_keras
import tdjax.keras
from _options import InputError

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--steps", "6", "--hidden", "2", "--batch-size", "2", "--optax-steps", "3"]


def make_windows(lengths, seed):
    """The tag of a symbol is whether it is odd."""
    there = np.arange(6) < np.asarray(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(0, 9, there.shape)
    ids = np.where(there, ids, 0).astype(np.int32)
    labels = np.where(there, ids % 2, _sequences.NO_LABEL)
    lengths = np.asarray(lengths, np.int32)
    return _sequences.Windows(ids[..., None], labels, lengths, [], [])


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Another task, with few examples."""
    train = make_windows([6, 3, 5, 1, 6, 2, 4, 6, 3, 5, 6, 1, 2, 6, 6, 4, 3, 6], 0)
    sides = train, make_windows([6, 2, 5], 1)
    task = _sequences.Task("odd", "symbol", ("even", "odd"), 9, *sides)
    monkeypatch.setattr(from_keras, "python_task", lambda length: task)
    return task


@pytest.fixture
def settings():
    return from_keras.KerasSettings(hidden=2, batch_size=2, steps=6)


def run(out, *arguments):
    return from_keras.main([*TINY, "--out", str(out), *map(str, arguments)])


@pytest.fixture
def compared_already(monkeypatch):
    """The comparison compiles six programs, of which most tests need none."""
    rows = {"keras.layers": {"deviation": "0"}}
    monkeypatch.setattr(from_keras, "compare", lambda *_: rows)


def test_padding_is_zero_and_nothing_else_is(task):
    ids, labels = from_keras.examples_of(task.train)
    there = np.arange(6) < task.train.lengths[:, None]
    np.testing.assert_array_equal(ids != 0, there)
    np.testing.assert_array_equal(ids[there], task.train.ids[..., 0][there] + 1)
    np.testing.assert_array_equal(labels[there], (ids[there] - 1) % 2)
    assert not labels[~there].any()


def test_the_flax_loss_and_accuracy_of_ragged_examples_are_those_of_keras(
    task, settings
):
    examples = from_keras.examples_of(task.held_out)
    model = from_keras.compiled_tagger(task, settings)
    module, variables = tdjax.keras.to_flax(model)
    loss = from_keras.make_loss(module)(variables["params"], examples)
    keras_metrics = _keras_fit.evaluate(model, examples)
    assert float(loss) == pytest.approx(keras_metrics["loss"], rel=1e-5)
    accuracy = from_keras.flax_accuracy(module, variables, examples)
    assert accuracy == pytest.approx(keras_metrics["accuracy"], rel=1e-6)


def test_the_first_batches_are_the_same_whatever_part_of_the_run_has_them(settings):
    whole = _keras_fit.rows(settings, 0, 6, 18)
    parts = [_keras_fit.rows(settings, *part, 18) for part in ((0, 4), (4, 6))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_a_deviation_is_relative_to_the_largest_number_of_its_array():
    references = [np.array([1.0, -4.0]), np.array([100.0])]
    arrays = [np.array([1.5, -4.0]), np.array([101.0])]
    assert _keras_comparison._deviation(arrays, references) == 0.125
    assert _keras_comparison._deviation(references, references) == 0


@pytest.mark.slow
def test_the_three_take_the_same_steps(tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    rows = json.loads((tmp_path / "run/record.json").read_text())["notes"]
    assert list(rows) == ["keras.layers", "tdjax.keras", "to_flax"]
    for row in rows.values():
        assert float(row["deviation"]) < 1e-6
        assert float(row["after training"]) < 1e-5
    output = capsys.readouterr().out
    for name in rows:
        assert name in output


@pytest.mark.slow
@pytest.mark.usefixtures("compared_already")
def test_flax_and_keras_have_the_same_accuracies(tmp_path, capsys, task, settings):
    assert run(tmp_path / "run", "--learning-rate", "0.1") == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    accuracies = [line.split()[-2] for line in table if line.startswith("│")]
    after_fit, in_flax, trained_on, back, _ = accuracies
    assert after_fit == in_flax
    assert trained_on == back
    model = keras.saving.load_model(tmp_path / "run/from_flax.keras")
    held_out = from_keras.examples_of(task.held_out)
    assert f"{_keras_fit.evaluate(model, held_out)['accuracy']:.2%}" == back
    fitted = keras.saving.load_model(tmp_path / "run/model.keras")
    pairs = zip(model.get_weights(), fitted.get_weights())
    assert all((new != old).any() for new, old in pairs)


class Stopped(KeyboardInterrupt):
    """As by Ctrl-C."""


@pytest.mark.slow
@pytest.mark.usefixtures("compared_already")
def test_an_interrupted_run_goes_on_to_the_same_parameters(
    tmp_path, capsys, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole) == 0
    expected = capsys.readouterr().out.split("parameters ")[1]
    fit = keras.Sequential.fit

    def fit_or_stop(model, *args, **options):
        if model.optimizer.iterations == 3:
            raise Stopped
        return fit(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Sequential, "fit", fit_or_stop)
        assert run(broken) == 130
    assert capsys.readouterr().out.strip().endswith("--resume")
    assert run(broken, "--resume") == 0
    output = capsys.readouterr().out
    assert "Goes on from step 3 of 6." in output
    assert output.split("parameters ")[1] == expected
    for name in ("learning_curve.json", "learning_curve.png"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert run(broken) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(broken, "--resume", "--hidden", "3") == 2
    assert "--hidden is 3, was 2" in capsys.readouterr().err


def test_kills_between_the_two_files_leave_a_run_that_goes_on(
    tmp_path, settings, task, monkeypatch
):
    make = lambda: from_keras.compiled_tagger(task, settings)
    settings = dataclasses.replace(settings, out=tmp_path, resume=True)
    run = _keras_fit.FitRun(settings, {}, make)
    run.model.optimizer.build(run.model.trainable_variables)
    run.save()

    def killed(*paths):
        if paths[1] == run.file:
            raise Stopped
        return replace(*paths)

    replace = os.replace
    for _ in range(3):
        run = _keras_fit.FitRun(settings, {}, make)
        run.model.optimizer.iterations.assign_add(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(Stopped):
                run.save()
    assert _keras_fit.FitRun(settings, {}, make).step == 0


@pytest.mark.parametrize(
    "damage", ["weights", "record", "no object", "a digit of the record"]
)
def test_damaged_files_are_named_and_not_used(tmp_path, settings, task, damage):
    make = lambda: from_keras.compiled_tagger(task, settings)
    settings = dataclasses.replace(settings, out=tmp_path, resume=True)
    run = _keras_fit.FitRun(settings, {}, make)
    run.model.optimizer.build(run.model.trainable_variables)
    run.notes = {"row": {"deviation": "125"}}
    run.save()
    run.save()
    assert _keras_fit.FitRun(settings, {}, make).notes == run.notes
    record = tmp_path / "record.json"
    if damage == "weights":
        content = bytearray(run.file.read_bytes())
        content[len(content) // 2] ^= 1
        run.file.write_bytes(content)
    elif damage == "record":
        record.write_text("{")
    elif damage == "no object":
        record.write_text("3")
    else:
        record.write_text(record.read_text().replace("125", "126"))
    with pytest.raises(InputError, match=r"model.keras or record.json is damaged"):
        _keras_fit.FitRun(settings, {}, make)


def start_with(**environment):
    command = [sys.executable, str(EXAMPLES / "from_keras.py"), "--help"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_keras_it_says_what_is_missing_in_one_line(tmp_path):
    (tmp_path / "keras.py").write_text("raise ImportError('no Keras here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = start_with(PYTHONPATH=path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "error: this program needs Keras on JAX: pip install"
    )


def test_another_backend_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    assert run(tmp_path / "run") == 2
    assert "KERAS_BACKEND is 'torch'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
