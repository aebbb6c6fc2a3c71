"""The tagging example: runs that are killed, interrupted and go on."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import _checkpoints
import tagging
from conllu_text import conllu_line, sentences

EXAMPLES = Path(__file__).parents[2] / "examples"

# They share one set of runs, which one worker makes.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tagging runs")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "x.conllu"
    path.write_text("\n\n".join(sentences(40)))
    return str(path)


def command(*arguments):
    return [sys.executable, str(EXAMPLES / "tagging.py"), *map(str, arguments)]


# Enough that a signal after the first line comes long before the end.
STEPS = 900


def tiny(corpus, out, *arguments):
    sizes = ("--hidden", 4, "--batch-size", 4, "--steps", STEPS)
    often = ("--checkpoint-every", 75, "--out", out)
    return command("--conllu", corpus, corpus, *sizes, *often, *arguments)


def start(arguments):
    # In a group of its own, so that a signal to it is none to the tests.
    options = {"text": True, "start_new_session": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, **options, **pipes)


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def stop_in_training(arguments, signal_number):
    """Sends the signal once some steps are done; returns what was printed."""
    process, printed = start(arguments), ""
    for line in process.stdout:
        printed += line
        if line.startswith("step"):
            break
    os.killpg(process.pid, signal_number)
    code, rest = finish(process)
    return code, printed + rest


def parameters(output):
    return output.split("parameters ")[1].split()[0]


def steps_saved(out):
    names = [path.name for path in (out / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


class Runs:
    """One run without a break, one killed and one interrupted, which then went on."""

    def __init__(self, corpus, folder):
        self.whole, self.killed, self.interrupted = (
            folder / name for name in ("whole", "killed", "interrupted")
        )
        killed = tiny(corpus, self.killed)
        # Only the interrupt makes a checkpoint.
        interrupted = tiny(corpus, self.interrupted, "--checkpoint-every", STEPS)
        # Side by side, for most of a run's time is the start of JAX.
        signals = {signal.SIGKILL: killed, signal.SIGINT: interrupted}
        with ThreadPoolExecutor() as pool:
            stopped = pool.map(stop_in_training, signals.values(), signals)
            self.kill, self.interrupt = stopped
        self.saved_by_killed = steps_saved(self.killed)
        self.saved_by_interrupted = steps_saved(self.interrupted)
        commands = [tiny(corpus, self.whole)]
        commands += [[*broken, "--resume"] for broken in (killed, interrupted)]
        processes = [start(arguments) for arguments in commands]
        self.whole_end, self.killed_end, self.interrupted_end = map(finish, processes)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    return Runs(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(runs):
    """The folder of a finished run."""
    assert runs.whole_end[0] == 0
    return runs.whole


def test_a_run_reports_accuracy_and_baseline_and_leaves_its_files(runs):
    code, output = runs.whole_end
    assert code == 0, output
    assert "warning" not in output.lower()
    numbers = json.loads((runs.whole / "learning_curve.json").read_text())
    assert [point["step"] for point in numbers["curve"]] == [
        *range(STEPS // 10, STEPS + 1, STEPS // 10)
    ]
    final = numbers["curve"][-1]["held_out_accuracy"]
    assert f"{final:.2%}" in output
    assert "majority-class baseline" in output
    majority = numbers["baselines"]["accuracy"]["majority class"]
    assert f"{majority:.2%}" in output
    assert final > 0.95 > 2 * majority
    assert (runs.whole / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert steps_saved(runs.whole)[-1] == STEPS
    files = ["checkpoints", "learning_curve.json", "learning_curve.png"]
    assert sorted(path.name for path in runs.whole.iterdir()) == files


def test_a_killed_run_goes_on_to_the_same_parameters(runs):
    assert runs.kill[0] == -signal.SIGKILL
    saved = runs.saved_by_killed[-1]
    assert 0 < saved < STEPS
    code, output = runs.killed_end
    assert code == 0, output
    assert f"Goes on from step {saved} of {STEPS}" in output
    assert parameters(output) == parameters(runs.whole_end[1])
    for name in ("learning_curve.json", "learning_curve.png"):
        assert (runs.killed / name).read_bytes() == (runs.whole / name).read_bytes()


def test_an_interrupted_run_says_how_to_go_on_and_does(runs):
    code, printed = runs.interrupt
    assert code == 130, printed
    (saved,) = runs.saved_by_interrupted
    assert saved < STEPS
    assert "Traceback" not in printed
    advice = printed.strip().splitlines()[-1]
    assert advice.startswith("Interrupted. Go on with: python ")
    assert advice.endswith("--resume")
    code, output = runs.interrupted_end
    assert code == 0, output
    assert f"Goes on from step {saved} of {STEPS}" in output
    assert parameters(output) == parameters(runs.whole_end[1])


def refused(capsys, arguments):
    assert tagging.main(arguments[2:]) == 2
    return capsys.readouterr().err


def test_other_settings_are_refused_by_name(finished, corpus, capsys):
    message = refused(
        capsys, tiny(corpus, finished, "--hidden", 5, "--seed", 1, "--resume")
    )
    assert "--hidden is 5, was 4" in message
    assert "--seed is 1, was 0" in message
    assert "--steps" not in message
    assert steps_saved(finished)[-1] == STEPS


def test_other_data_is_refused_by_name(finished, tmp_path, capsys):
    path = tmp_path / "x.conllu"
    path.write_text(conllu_line("1"))
    message = refused(capsys, tiny(path, finished, "--resume"))
    assert "tags is ['NOUN'], was ['ADJ', 'NOUN', 'VERB']" in message
    assert "training data" in message


def test_a_run_is_not_overwritten(finished, corpus, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    message = refused(capsys, tiny(corpus, finished))
    assert "--resume" in message
    assert "--out" in message
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_unusable_files_are_refused_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "x.conllu"
    path.write_text("1\tword")
    arguments = ["--conllu", str(path), str(path), "--out", str(tmp_path / "run")]
    assert tagging.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:1: found 2 column(s)")
    assert tagging.main([*arguments[:2], str(tmp_path / "none"), *arguments[3:]]) == 2
    assert tagging.main(["--conllu", "none", "none", *arguments[3:]]) == 2
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--batch-size", "-1"],
        ["--length", "1.5"],
        ["--hidden", "x"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**32)],
        ["--checkpoint-every", "0"],
        ["--conllu", "only-one"],
    ],
)
def test_options_are_checked(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        tagging.main(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_python_source_is_tagged_from_end_to_end(tmp_path, capsys):
    sizes = ["--steps", "20", "--hidden", "8", "--batch-size", "8", "--length", "256"]
    assert tagging.main([*sizes, "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "majority-class baseline" in output
    assert "tags predicted for" in output
    numbers = json.loads((tmp_path / "run/learning_curve.json").read_text())
    assert 0.2 < numbers["baselines"]["accuracy"]["majority class"] < 0.4
    losses = [point["held_out_loss"] for point in numbers["curve"]]
    assert losses[-1] < losses[0]


def test_the_checksum_sees_every_bit():
    tree = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    same = jax.tree.map(np.copy, tree)
    assert _checkpoints.checksum(tree) == _checkpoints.checksum(same)
    same["a"][1] = -0.0
    assert _checkpoints.checksum(tree) != _checkpoints.checksum(same)
    swapped = {"a": tree["b"], "b": tree["a"]}
    assert _checkpoints.checksum(tree) != _checkpoints.checksum(swapped)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    _checkpoints.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _checkpoints.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]
