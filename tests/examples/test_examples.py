"""Every example runs from end to end, in a small version, and is one file."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
SHARED = {"_conllu", "_python_source"}


def imports(program):
    """The modules that a program imports from."""
    tree = ast.parse((EXAMPLES / f"{program}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_what_the_programs_share_is_data():
    assert {path.stem for path in EXAMPLES.glob("_*.py")} == SHARED


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_one_file_and_has_no_private_names(program):
    lines = (EXAMPLES / f"{program}.py").read_text().splitlines()
    longest = {"resumable_training": 232, "sharded_training": 230}
    assert 100 <= len(lines) <= longest.get(program, 200)
    private = {m for m in imports(program) if any(p[0] == "_" for p in m.split("."))}
    assert {name.split(".")[0] for name in private} <= SHARED
    uses_tagger = program in ("from_keras", "resumable_training")
    assert {*imports(program)} & {*PROGRAMS} == ({"tagging"} if uses_tagger else set())


def test_every_program_has_a_row_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| [")]
    assert [row.split("[")[1].split("]")[0] for row in rows] == PROGRAMS
    for program, row in zip(PROGRAMS, rows):
        assert f"](./{program}.py)" in row


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_shows_a_result_beside_a_baseline_and_leaves_a_picture(
    program, tmp_path, capsys
):
    if program == "from_keras":
        pytest.importorskip("keras")
    main = importlib.import_module(program).main
    assert {"steps", "out"} <= inspect.signature(main).parameters.keys()
    results = main(steps=2, out=tmp_path / "run")
    assert len(results) >= 2  # its own, and a baseline's
    output = capsys.readouterr().out
    assert "step" in output
    pictures = list((tmp_path / "run").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in output
