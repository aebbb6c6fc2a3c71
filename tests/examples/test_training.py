"""The loop of all examples, on a problem that takes no time."""

import json
import os
import re
import shutil
import signal
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import _batches
import _checkpoints
import _display
import _main
import _options
import _problem

STEPS = 20
EVERY = 8


@dataclass(frozen=True)
class LineSettings(_options.Settings):
    steps: int = STEPS
    checkpoint_every: int = EVERY
    offset: float = _options.option(3.0, "of the line")


class Line(_problem.Problem):
    """Fits a line to points.

    Every step draws noise, so a resumed run is right only if it draws the same noise.
    """

    quantities = {"loss": ".3f"}
    baselines = {"loss": {"zero": 1.0}}

    def __init__(self, settings):
        x = np.linspace(-1, 1, 30, dtype=np.float32)
        y = 2 * x + settings.offset
        self.train, self.held_out = (x[::2], y[::2]), (x[1::2], y[1::2])

    def init(self, key):
        return {"slope": jax.random.normal(key), "offset": jnp.zeros(())}

    def loss(self, params, batch, key):
        x, y = batch
        y += 0.1 * jax.random.normal(key, y.shape)
        return self.error(params, x, y), {}

    def evaluate(self, params, examples):
        return {"loss": float(self.error(params, *examples))}

    def error(self, params, x, y):
        return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)

    def report(self, params, console, out):
        console.print(f"slope {params['slope']:.3f}")


class BrokenLine(Line):
    """Is stopped while it measures the point after 10 of the 20 steps."""

    measured = 0

    def evaluate(self, params, examples):
        self.measured += examples is self.held_out
        if self.measured == 5:
            self.stop()
        return super().evaluate(params, examples)


class Interrupted(BrokenLine):
    def stop(self):
        signal.raise_signal(signal.SIGINT)


class Crashed(BrokenLine):
    def stop(self):
        raise RuntimeError("power cut")


def run(out, *arguments, problem=Line):
    return _main.run_example(problem, LineSettings, ["--out", str(out), *arguments])


def ending(capsys):
    """Of the last run: the step it began with and its parameters."""
    output = capsys.readouterr().out
    began = output.split("from step ")[1].split()[0] if "from step" in output else "0"
    return int(began), output.split("parameters ")[1].split()[0]


def curve(out):
    return json.loads((out / "learning_curve.json").read_text())


@pytest.fixture
def whole(tmp_path, capsys):
    """The folder of a run without a break, and its parameters."""
    assert run(tmp_path / "whole") == 0
    return tmp_path / "whole", ending(capsys)[1]


def test_the_loop_learns(whole):
    numbers = curve(whole[0])
    assert [point["step"] for point in numbers["curve"]] == [*range(2, STEPS + 1, 2)]
    losses = [point["held_out_loss"] for point in numbers["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert numbers["baselines"] == {"loss": {"zero": 1.0}}


def test_an_interrupted_run_ends_as_one_without_a_break(whole, tmp_path, capsys):
    folder, parameters = whole
    out = tmp_path / "broken"
    assert run(out, problem=Interrupted) == 130
    assert "Go on with: python " in capsys.readouterr().out
    assert run(out, "--resume") == 0
    assert ending(capsys) == (10, parameters)
    assert curve(out) == curve(folder)


def test_a_crashed_run_goes_on_from_its_last_checkpoint(whole, tmp_path, capsys):
    folder, parameters = whole
    out = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="power cut"):
        run(out, problem=Crashed)
    assert run(out, "--resume") == 0
    assert ending(capsys) == (EVERY, parameters)
    assert curve(out) == curve(folder)


def data_file(checkpoint):
    """The largest of its files: the arrays."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_a_digit(path, before):
    """The first that comes after a text."""
    text = path.read_text()
    place = re.search(rf"{before}\D*", text).end()
    path.write_text(f"{text[:place]}{9 - int(text[place])}{text[place + 1 :]}")


DAMAGES = {
    "flipped at the start": lambda step: flip(data_file(step / "state"), 8),
    "flipped in the middle": lambda step: flip(
        data_file(step / "state"), data_file(step / "state").stat().st_size // 2
    ),
    "flipped at the end": lambda step: flip(data_file(step / "state"), -1),
    "cut": lambda step: os.truncate(data_file(step / "state"), 10),
    "no arrays": lambda step: shutil.rmtree(step / "state"),
    "bad record": lambda step: data_file(step / "record").write_text("{"),
    "other record": lambda step: data_file(step / "record").write_text("{}"),
    "curve": lambda step: change_a_digit(data_file(step / "record"), "held_out_loss"),
    "settings": lambda step: change_a_digit(data_file(step / "record"), "--seed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    whole, tmp_path, capsys, name
):
    folder, parameters = whole
    steps = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert [step.name for step in steps] == ["16", "20"]
    DAMAGES[name](steps[1])
    assert run(folder, "--resume") == 0
    output = capsys.readouterr().out
    assert f"{steps[1]} is damaged: " in output
    assert "from step 16 of 20" in output
    assert output.split("parameters ")[1].split()[0] == parameters
    assert run(folder, "--resume") == 0
    assert "is damaged" not in capsys.readouterr().out


def test_if_all_checkpoints_are_damaged_the_run_says_so_and_deletes_none(whole, capsys):
    folder, _ = whole
    steps = list((folder / "checkpoints").iterdir())
    for step in steps:
        flip(data_file(step / "state"), -1)
    assert run(folder, "--resume") == 2
    message = capsys.readouterr().err
    assert all(f"{step} is damaged" in message for step in steps)
    assert "No other checkpoint is kept" in message
    assert all(step.exists() for step in steps)


def test_a_second_process_in_the_folder_is_told_so_in_a_sentence(tmp_path, capsys):
    pytest.importorskip("fcntl")
    with _checkpoints.claimed(tmp_path / "run"):
        assert run(tmp_path / "run") == 2
    assert "another process is at work in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run") == 0


def test_a_folder_that_was_there_before_stays(tmp_path, capsys):
    with _checkpoints.claimed(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_lock_that_was_removed_while_it_was_taken_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    taken, flock = [], fcntl.flock

    def remove_first(handle, how):
        if not taken:
            (tmp_path / _checkpoints.LOCK).unlink()
        taken.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with _checkpoints.claimed(tmp_path):
        assert len(taken) == 2
        with pytest.raises(_options.InputError), _checkpoints.claimed(tmp_path):
            pass


def test_a_full_disk_is_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    def save(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", save)
    assert run(tmp_path / "full") == 2
    assert "no space left on the disk for" in capsys.readouterr().err


def test_another_seed_ends_elsewhere(whole, tmp_path, capsys):
    assert run(tmp_path / "other", "--seed", "1") == 0
    assert ending(capsys)[1] != whole[1]


def test_only_the_same_problem_goes_on(whole, capsys):
    folder, parameters = whole
    assert run(folder, "--resume", "--offset", "2") == 2
    assert "--offset is 2.0, was 3.0" in capsys.readouterr().err

    class OtherData(Line):
        def __init__(self, settings):
            super().__init__(settings)
            self.held_out = self.train

    assert run(folder, "--resume", problem=OtherData) == 2
    message = capsys.readouterr().err
    assert "held-out data" in message
    assert "training data" not in message
    assert run(folder, "--resume", "--checkpoint-every", "3") == 0
    assert ending(capsys) == (STEPS, parameters)


def test_a_default_of_an_example_keeps_the_help_and_the_check(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("unused", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Fits a line to points." in shown
    assert f"steps of training (default: {STEPS})" in shown
    with pytest.raises(SystemExit, match="2"):
        run("unused", "--steps", "0")
    assert "argument --steps: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 4, 5, 9])
def test_in_batches_every_example_is_taken_once(size):
    sizes = []

    def double(batch):
        sizes.append(len(batch["x"]))
        return batch["x"] * 2, batch["y"].sum(axis=1)

    examples = {"x": np.arange(5), "y": np.arange(10).reshape(5, 2)}
    doubled, sums = _batches.in_batches(double, examples, size)
    assert doubled.tolist() == [0, 2, 4, 6, 8]
    assert sums.tolist() == [1, 5, 9, 13, 17]
    assert {*sizes} == {size}


def test_no_batch_of_a_run_has_more_steps_than_the_capacity():
    settings = LineSettings(steps=7, batch_size=2, seed=3)
    lengths = np.array([1, 10, 100, 1000, 10000])
    totals = [
        lengths[_batches.batch_rows(3, step, 2, 5)].sum()
        for step in range(settings.steps)
    ]
    assert _batches.most_steps(lengths, settings) == max(totals)


def test_models_side_by_side_train_as_if_alone():
    alone = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    other = optax.adam(0.3)
    params = {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(3)}}
    gradients = {"a": {"w": jnp.full(2, 100.0)}, "b": {"w": jnp.arange(3.0)}}
    together = _problem.each_alone({"a": alone, "b": other})
    state = together.init(params)
    updates = [together.update(gradients, state)[0]]
    # Adam's first update does not depend on the norm; the next does.
    smaller = jax.tree.map(lambda x: x / 50, gradients)
    _, state = together.update(gradients, state)
    updates.append(together.update(smaller, state)[0])
    for name, optimizer in {"a": alone, "b": other}.items():
        state = optimizer.init(params[name])
        first, state = optimizer.update(gradients[name], state)
        second, _ = optimizer.update(smaller[name], state)
        for given, expected in zip(updates, (first, second)):
            np.testing.assert_array_equal(given[name]["w"], expected["w"])


def test_a_table_has_a_column_for_everything_that_some_method_has():
    rows = {"ours": {"accuracy": "90%", "wrong": "1"}, "baseline": {"accuracy": "5%"}}
    table = _display.results("title", rows)
    columns = {column.header: [*column.cells] for column in table.columns}
    assert columns == {
        "": ["ours", "baseline"],
        "accuracy": ["90%", "5%"],
        "wrong": ["1", ""],
    }
