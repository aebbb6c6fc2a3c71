"""The example on a mesh: its rows of digits, and the same losses on any devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sharded_training
from sharded_training import LONGEST, SHORTEST, rows_of_digits

PROGRAM = Path(sharded_training.__file__)


def test_a_row_is_padded_with_nan_and_labels_spell_its_last_three_digits():
    images, mask, labels = rows_of_digits(3)
    lengths = mask.sum(1)
    assert lengths.min() >= SHORTEST
    assert lengths.max() <= LONGEST
    assert (mask == (np.arange(LONGEST) < lengths[:, None])).all()
    assert np.isnan(images[~mask]).all()
    assert np.isfinite(images[mask]).all()
    assert (labels[:, :2] == -1).all()
    newest = labels[:, 2:] % 10
    assert (labels[:, 3:] % 1000 // 10 == labels[:, 2:-1] % 100).all()
    # An image and its digit: all images of a digit are more alike than others.
    shown = images[:, 2:][mask[:, 2:]].reshape(-1, 64)
    digits = newest[mask[:, 2:]]
    means = np.stack([shown[digits == digit].mean(0) for digit in range(10)])
    nearest = ((shown[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == digits).mean() > 0.8


def test_held_out_rows_show_other_images():
    sides = [rows_of_digits(0), rows_of_digits(1), rows_of_digits(0, held_out=True)]
    images = [{x.tobytes() for x in images[mask]} for images, mask, _ in sides]
    assert images[0] & images[1]
    assert not images[0] & images[2]


def test_weights_and_what_adam_keeps_of_them_are_split_alike():
    state = jax.eval_shape(sharded_training.new_state, jax.random.key(0))
    specs = jax.tree.map_with_path(lambda path, _: sharded_training.split(path), state)
    split = [spec for spec in jax.tree.leaves(specs["params"]) if spec != P()]
    assert len(split) == sharded_training.LAYERS * 6 + 1
    for moments in (specs["adam"][0].mu, specs["adam"][0].nu):
        assert moments == specs["params"]


def run(out, *options):
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, str(PROGRAM), "--out", str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "results.json").read_text())["losses"], done.stdout


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_have_left_and_losses_are_the_same(tmp_path):
    steps = ("--steps", "6", "--save-every", "3")
    alone, _ = run(tmp_path / "alone", *steps)
    assert len(alone) == 6
    assert alone[-1] < alone[0]
    moved = tmp_path / "moved"
    halves = ("--steps", "3", "--save-every", "3")
    on_two, said = run(moved, "--processes", "2", "--devices", "2", *halves)
    assert said.count("2 process(es), mesh {'data': 2, 'model': 2}") == 1
    np.testing.assert_allclose(on_two, alone[:3], rtol=0, atol=2e-6)
    on_one, said = run(moved, "--resume", *steps)
    assert "step   3/6" not in said
    np.testing.assert_allclose(on_one, alone, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_losses_on_8_devices_are_those_on_one(tmp_path):
    alone, _ = run(tmp_path / "one", "--steps", "6")
    on_eight, said = run(tmp_path / "eight", "--steps", "6", "--devices", "8")
    assert "mesh {'data': 4, 'model': 2}" in said
    np.testing.assert_allclose(on_eight, alone, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_it_reads_numbers_that_no_digit_alone_tells(tmp_path):
    results = sharded_training.main(out=tmp_path)
    assert results["transformer"] > 0.85
    assert results["newest digit alone"] == 0.01


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds a run: see --resume and --out"):
        sharded_training.main(steps=1, out=tmp_path)
    with pytest.raises(SystemExit, match="holds no run"):
        sharded_training.main(steps=1, out=tmp_path / "other", resume=True)
