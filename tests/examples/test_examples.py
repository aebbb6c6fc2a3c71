"""Every example runs from end to end, in a small version."""

import importlib
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# Options with which a program takes a few seconds.
SMALL = {
    "dense_families": ["--steps", "4", "--days", "10", "--batch-size", "2"],
    "encoder_decoder": ["--steps=2", "--hidden=2", "--batch-size=2", "--examples=99"],
    "from_keras": ["--steps=2", "--hidden=2", "--batch-size=2", "--length=16"],
    "language_model": ["--steps=2", "--hidden=2", "--batch-size=2", "--characters=9"],
    "many_to_one": ["--steps", "4", "--hidden", "2", "--batch-size", "2"],
    "tagging": ["--steps", "4", "--hidden", "2", "--batch-size", "2"],
    "hierarchical": ["--steps", "2", "--hidden", "2", "--batch-size", "2"],
    "video": ["--steps", "2", "--hidden", "2", "--batch-size", "2"],
}


def test_every_program_is_run_here_and_has_a_row_in_the_readme():
    programs = {path.stem for path in EXAMPLES.glob("[!_]*.py")}
    assert programs == SMALL.keys()
    readme = (EXAMPLES / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| [")]
    assert {row.split("[")[1].split("]")[0] for row in rows} == programs
    for row in rows:
        name = row.split("[")[1].split("]")[0]
        assert f"]({name}.py)" in row
        assert f"`.venv/bin/python examples/{name}.py`" in row


@pytest.mark.slow
@pytest.mark.parametrize("program", SMALL)
def test_a_program_shows_a_result_beside_a_baseline_and_leaves_a_picture(
    program, tmp_path, capsys
):
    if program == "from_keras":
        pytest.importorskip("keras")
    out = tmp_path / "run"
    main = importlib.import_module(program).main
    assert main([*SMALL[program], "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "baseline" in output
    numbers = json.loads((out / "learning_curve.json").read_text())
    for quantity, baselines in numbers["baselines"].items():
        assert baselines
        assert f"held_out_{quantity}" in numbers["curve"][-1]
    assert "learning_curve.png" in {path.name for path in out.glob("*.png")}
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in output
