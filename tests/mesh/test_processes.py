"""Several processes train as one does, tune together, and leave checkpoints for one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

PROGRAM = Path(__file__).with_name("processes.py")
pytestmark = pytest.mark.slow


def run(folder, devices, processes=1):
    """What each process found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = folder / "found"
    command = [sys.executable, str(PROGRAM), str(out), str(devices)]
    path = os.pathsep.join([str(PROGRAM.parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    of_process = lambda i: [str(port), str(processes), str(i)] if processes > 1 else []
    running = [
        subprocess.Popen(
            [*command, *of_process(i)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert not any(process.returncode for process in running), errors[0][-2000:]
    files = [out.with_suffix(f".{i}") for i in range(processes)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    (found,) = run(tmp_path_factory.mktemp("one"), devices=1)
    return found


JOBS = [
    pytest.param((2, 2), marks=pytest.mark.mesh, id="2 x 2"),
    pytest.param((4, 1), id="4 x 1"),
]


@pytest.fixture(scope="module", params=JOBS)
def job(request, tmp_path_factory):
    """`(folder, what each process found)`."""
    processes, devices = request.param
    folder = tmp_path_factory.mktemp(f"{processes} processes")
    found = run(folder, devices, processes)
    assert [x["processes"] for x in found] == [processes] * processes
    assert {x["devices"] for x in found} == {4}
    return folder, found


def leaves(run_of_training):
    losses, params = run_of_training
    return [np.array(x) for x in (losses, *params)]


@pytest.mark.parametrize(
    "name", ["plain", "words, packed", "explicit, chunks", "explicit, words"]
)
def test_losses_and_parameters_after_three_steps_are_those_of_one_process(
    job, one_process, name
):
    want = leaves(one_process[name])
    assert want[0].shape == (3,)
    assert want[0][2] < want[0][0]
    for process in job[1]:
        for got, expected in zip(leaves(process[name]), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_the_device_that_overflows_shows_nan_and_no_other(job):
    lengths = [6, 5, 6, 0, 3, 2, 6, 5, 4, 1, 0, 0]
    mask = np.arange(6) < np.array(lengths)[:, None]
    # 4 devices with 3 examples each, and 16 steps: the first has 17.
    assert mask.reshape(4, -1).sum(1).tolist() == [17, 5, 15, 1]
    for process in job[1]:
        is_nan = np.array(process["overflow"])
        assert is_nan.sum() == 1
        assert is_nan[2, 5]


def test_all_processes_take_the_same_lowering_and_the_first_keeps_it(job):
    tuned = [process["tuned"] for process in job[1]]
    assert all(x["options"] == tuned[0]["options"] for x in tuned)
    assert all(x["from cache"] == [False, True] for x in tuned)
    assert all(x["entries"] == 1 for x in tuned)


def test_what_one_process_cannot_run_none_takes(job):
    for process in job[1]:
        vmap, fold, chunks, loop = process["tuned"]["failed"]
        assert (fold, chunks) == ("failed", "failed")
        assert {vmap, loop} <= {"measured", "behind"}


def test_one_process_restores_the_checkpoint_of_several(job, one_process):
    folder, _ = job
    want = leaves(one_process["explicit, words"])[1:]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        path = folder / "found.checkpoint"
        metadata = checkpointer.metadata(path).item_metadata.tree
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), metadata
        )
        restored = checkpointer.restore(path, like)
    for got, expected in zip(jax.tree.leaves(restored), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
