"""A run that is stopped in any way goes on as if it had not been."""

import errno
import gc
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import resumable_training
import tagging
from helpers import slow_but

PROGRAM = resumable_training.__file__
STEPS, SAVE_EVERY = 20, 8


class TinyTagger(nn.Module):
    """Has dropout: a resumed run is right only if it draws the same noise."""

    vocabulary: int
    tags: int

    @nn.compact
    def __call__(self, ids, lengths, train=False):
        x = nn.Embed(self.vocabulary, tagging.HIDDEN)(ids).sum(axis=2)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.tags)(x)


def tiny_task():
    """The tag of an id is its remainder by three."""
    ids = np.random.default_rng(0).integers(9, size=(30, 8, 1)).astype(np.int32)
    examples = ids, ids[..., 0] % 3, np.arange(30, dtype=np.int32) % 8 + 1
    train, held_out = (
        [x[rows] for x in examples] for rows in np.split(range(30), [20])
    )
    return train, held_out, ("zero", "one", "two"), 9


def make_tiny(monkeypatch):
    monkeypatch.setattr(tagging, "Tagger", TinyTagger)
    monkeypatch.setattr(tagging, "python_task", tiny_task)
    for name, value in {"BATCH": 4, "HIDDEN": 16, "LENGTH": 8}.items():
        monkeypatch.setattr(tagging, name, value)


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs the tiny program; returns its exit code, its output and its errors."""
    make_tiny(monkeypatch)

    def run(out, *arguments):
        sizes = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
        command = [PROGRAM, *sizes, "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        try:
            runpy.run_path(PROGRAM, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        plt.close("all")
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without a break, and what `main` returned."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_tiny(monkeypatch)
        results = resumable_training.main(STEPS, out, save_every=SAVE_EVERY)
    plt.close("all")
    return out, results


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the run without a break."""
    return shutil.copytree(whole[0], tmp_path / "finished")


@pytest.fixture
def at_step(monkeypatch):
    """Acts once, when the batch of a step is drawn."""
    default_rng = np.random.default_rng

    def schedule(number, act):
        def draw(seed):
            if seed == [0, number]:
                monkeypatch.setattr(np.random, "default_rng", default_rng)
                act()
            return default_rng(seed)

        monkeypatch.setattr(np.random, "default_rng", draw)

    return schedule


ctrl_c = lambda: signal.raise_signal(signal.SIGINT)


def saved_steps(out):
    names = [path.name for path in (out / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def results_of(out):
    return json.loads((out / "results.json").read_text())


def assert_goes_on(ended, first, out, whole):
    """That a program went on from a step to the results of a run without a break."""
    code, output, errors = ended
    assert (code, errors) == (0, "")
    assert f"Goes on from step {first} of " in output
    assert f"parameters: {results_of(whole)['parameters']}\n" in output
    for name in ("results.json", "learning_curve.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_learns_and_leaves_its_files(whole):
    out, results = whole
    assert results_of(out) == results
    assert [step for step, _ in results["curve"]] == [*range(2, STEPS + 1, 2)]
    assert results["curve"][-1][1] == results["tagger"] > results["baseline"] + 0.1
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert saved_steps(out) == [16, 20]
    files = {"checkpoints", "learning_curve.png", "results.json", "settings.json"}
    assert {path.name for path in out.iterdir()} == {*files, ".lock"}


def test_a_run_prints_its_progress_and_result_alone(program, whole, tmp_path):
    threads = {*threading.enumerate()}
    code, output, errors = program(tmp_path)
    assert (code, errors) == (0, "")
    *progress, tagger, baseline, checksum, picture = output.splitlines()
    words = [["step", str(step)] for step in range(2, STEPS + 1, 2)]
    assert [line.split("/")[0].split() for line in progress] == words
    assert tagger == f"tagger: {whole[1]['tagger']:.2%} of held-out steps right"
    assert baseline == f"baseline, always 'zero': {whole[1]['baseline']:.2%}"
    assert checksum == f"parameters: {whole[1]['parameters']}"
    assert picture == f"picture: {tmp_path / 'learning_curve.png'}"
    assert {*threading.enumerate()} <= threads


def test_ctrl_c_saves_and_says_how_to_go_on(program, whole, tmp_path, at_step):
    at_step(10, ctrl_c)
    code, output, errors = program(tmp_path)
    assert (code, errors) == (130, "")
    assert saved_steps(tmp_path) == [8, 10]
    command = shlex.join(["python", *sys.argv, "--resume"])
    assert output.endswith(f"\nInterrupted. Go on with: {command}\n")
    assert_goes_on(program(tmp_path, "--resume"), 10, tmp_path, whole[0])


def test_a_second_ctrl_c_acts_at_once(program, tmp_path, at_step):
    previous = signal.getsignal(signal.SIGINT)
    at_step(10, lambda: [ctrl_c(), ctrl_c()])
    code, output, _ = program(tmp_path, "--resume")
    assert code == 130
    assert saved_steps(tmp_path) == [8]
    assert output.count("--resume") == 1
    assert signal.getsignal(signal.SIGINT) is previous


@pytest.mark.parametrize(("crash", "last"), [(3, 0), (15, 8)])
def test_a_crashed_run_goes_on_from_its_last_checkpoint(
    program, whole, tmp_path, at_step, crash, last
):
    at_step(crash, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program(tmp_path)
    assert_goes_on(program(tmp_path, "--resume"), last, tmp_path, whole[0])


def test_a_finished_run_is_shown_again(program, whole, finished):
    again = program(finished, "--resume", "--save-every", "3")
    assert_goes_on(again, STEPS, finished, whole[0])


def test_another_seed_ends_elsewhere(program, whole, tmp_path):
    program(tmp_path, "--seed", "1")
    assert results_of(tmp_path)["parameters"] != whole[1]["parameters"]


def test_a_run_is_not_overwritten(program, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, _, errors = program(finished)
    assert code == 2
    sentence = f"{finished} holds a run: add --resume, or give another --out"
    assert errors == f"error: {sentence}\n"
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_other_options_and_data_are_refused_by_name(program, finished, monkeypatch):
    def refusal(*arguments):
        code, _, errors = program(finished, "--resume", *arguments)
        assert code == 2
        return errors.split("holds another run: ")[1]

    assert refusal("--seed", "1") == "--seed is 1, was 0\n"
    both = "--steps is 30, was 20; --seed is 7, was 0\n"
    assert refusal("--seed", "7", "--steps", "30") == both
    for name, was in {"BATCH": 4, "HIDDEN": 16, "LENGTH": 8}.items():
        with monkeypatch.context() as patch:
            patch.setattr(tagging, name, 5)
            assert refusal() == f"{name} is 5, was {was}\n"
    for side in (0, 1):
        task = tiny_task()
        task[side][1][-1, -1] += 1
        monkeypatch.setattr(tagging, "python_task", lambda task=task: task)
        assert refusal().startswith("data checksum is ")
    assert saved_steps(finished) == [16, 20]


@pytest.mark.parametrize(
    "option",
    ["--steps=0", "--save-every=0", "--seed=-1", f"--seed={2**32}", "--steps=x"],
)
def test_options_are_checked(program, tmp_path, option):
    code, _, errors = program(tmp_path / "run", option)
    assert code == 2
    assert option.split("=")[0] in errors
    assert not (tmp_path / "run").exists()


def state_at(step):
    """Without a model; any two differ."""
    params = {"w": jax.random.normal(jax.random.key(step), (4000,))}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-2))
    return state.replace(step=jnp.array(step))


@pytest.fixture
def checkpoints(tmp_path):
    """Those of steps 1 and 2."""
    path, options = tmp_path / "checkpoints", resumable_training.OPTIONS
    with ocp.CheckpointManager(path, options=options) as manager:
        resumable_training.save(manager, [[1, 0.125]], state_at(1))
        resumable_training.save(manager, [[1, 0.125], [2, 0.25]], state_at(2))
        yield manager
    gc.collect()  # so that what Orbax leaves of a failed read belongs to this test


def arrays(checkpoint):
    """The largest of its files."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(checkpoint, place):
    content = bytearray(arrays(checkpoint).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    arrays(checkpoint).write_bytes(content)


def change_record(checkpoint, old, new):
    record = checkpoint / "record/metadata"
    assert old in record.read_text()
    record.write_text(record.read_text().replace(old, new))


DAMAGES = {
    "flipped at the start": lambda step: flip(step, 0.001),
    "flipped in the middle": lambda step: flip(step, 0.5),
    "flipped at the end": lambda step: flip(step, 0.9),
    "cut": lambda step: os.truncate(arrays(step), 10),
    "no arrays": lambda step: shutil.rmtree(step / "state"),
    "no record": lambda step: shutil.rmtree(step / "record"),
    "bad record": lambda step: change_record(step, "{", ""),
    "no checksum": lambda step: change_record(step, "checksum", "sum"),
    "another curve": lambda step: change_record(step, "0.25", "0.26"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", slow_but((0, 2, 5), [*DAMAGES]))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    checkpoints, tmp_path, capsys, name
):
    DAMAGES[name](tmp_path / "checkpoints/2")
    curve, state = resumable_training.restore(checkpoints, state_at(0))
    assert curve == [[1, 0.125]]
    jax.tree.map(np.testing.assert_array_equal, state.params, state_at(1).params)
    assert f"{tmp_path}/checkpoints/2 is damaged: " in capsys.readouterr().out
    assert [*checkpoints.all_steps()] == [1]


def test_a_damaged_run_goes_on_to_the_same_end(program, whole, finished):
    flip(finished / "checkpoints/20", 0.5)
    ended = program(finished, "--resume")
    assert f"{finished}/checkpoints/20 is damaged: " in ended[1]
    assert_goes_on(ended, 16, finished, whole[0])
    assert saved_steps(finished) == [16, 20]


def test_if_all_checkpoints_are_damaged_none_is_deleted(program, finished):
    for step in (16, 20):
        flip(finished / f"checkpoints/{step}", 0.5)
    code, output, errors = program(finished, "--resume")
    assert code == 2
    for step in (16, 20):
        assert f"{finished}/checkpoints/{step} is damaged: " in output
    assert errors.startswith("error: every checkpoint is damaged")
    assert saved_steps(finished) == [16, 20]


def test_a_full_disk_is_a_sentence(program, whole, tmp_path, at_step, monkeypatch):
    full = SimpleNamespace(free=2**20)
    with monkeypatch.context() as patch:
        at_step(10, lambda: patch.setattr(shutil, "disk_usage", lambda _: full))
        code, _, errors = program(tmp_path)
    assert code == 2
    assert errors == "error: disk full at step 16: make room, then add --resume\n"
    assert_goes_on(program(tmp_path, "--resume"), 8, tmp_path, whole[0])


@pytest.mark.parametrize("place", [(ocp.CheckpointManager, "save"), (tagging, "draw")])
def test_so_is_one_that_becomes_full(program, tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*place, fail)
    code, _, errors = program(tmp_path)
    assert code == 2
    assert errors == "error: [Errno 28] No space left on device\n"


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(program, finished):
    command = [sys.executable, "-c", HOLD, finished / ".lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        code, _, errors = program(finished, "--resume")
        holder.kill()
    assert code == 2
    assert errors == f"error: another process is at work in {finished}\n"
    assert program(finished, "--resume")[0] == 0


def test_a_run_keeps_others_out_of_its_folder(program, tmp_path, at_step):
    others = []
    at_step(10, lambda: others.append(program(tmp_path, "--resume")))
    assert program(tmp_path)[0] == 0
    assert others[0][0] == 2
    assert "another process is at work" in others[0][2]


def test_a_failed_write_leaves_the_old_files(tmp_path):
    (tmp_path / "x").write_text("old")
    replaced = resumable_training.replaced_at_once
    with pytest.raises(ZeroDivisionError), replaced(tmp_path) as folder:
        (folder / "x").write_text(f"new {1 / (folder / 'x').write_text('')}")
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]
    assert (tmp_path / "x").read_text() == "old"
    with replaced(tmp_path) as folder:
        (folder / "x").write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]
    assert (tmp_path / "x").read_text() == "new"


def test_the_checksum_sees_every_bit():
    zeros, ones = np.zeros(3, np.float32), np.ones(2, np.float32)
    tree = {"a": zeros, "b": ones, "c": [1, "x"]}
    checksum = resumable_training.checksum
    assert checksum(tree) == checksum(
        {"c": (1, "x"), "b": ones.copy(), "a": zeros.copy()}
    )
    others = [
        {**tree, "a": np.array([0, -0.0, 0], np.float32)},
        {**tree, "a": ones, "b": zeros},
        {**tree, "a": zeros[:, None]},
        {**tree, "a": zeros.astype(np.int32)},
        {**tree, "c": [2, "x"]},
        {**tree, "c": [1, "y"]},
        {**tree, "c": [1]},
    ]
    assert len({checksum(x) for x in (tree, *others)}) == 1 + len(others)


def start(out, *arguments):
    """The real program, in a process group of its own, compiled as for users."""
    command = [sys.executable, PROGRAM, "--out", str(out), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.Popen(command, start_new_session=True, env=environment, **pipes)


def finish(process, line_start=None, signal_number=0):
    """Waits for the end, or sends a signal after a line of output."""
    if line_start:
        while not (line := process.stdout.readline()).startswith(line_start):
            assert line, process.communicate()
        os.killpg(process.pid, signal_number)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.mark.slow
def test_a_killed_and_interrupted_run_ends_bit_for_bit_like_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output, errors = finish(start(whole))
    assert (code, errors) == (0, "")
    assert len(output.splitlines()) == 14
    assert results_of(whole)["tagger"] > 0.93 > 2 * results_of(whole)["baseline"]

    killed = finish(start(broken), "step   60", signal.SIGKILL)
    assert (killed[0], killed[2]) == (-signal.SIGKILL, "")
    first = saved_steps(broken)[-1]
    assert 50 <= first < 300
    assert first % 50 == 0
    interrupted = finish(start(broken, "--resume"), "step", signal.SIGINT)
    assert (interrupted[0], interrupted[2]) == (130, "")
    last = saved_steps(broken)[-1]
    assert first < last < 300
    assert_goes_on(finish(start(broken, "--resume")), last, broken, whole)
