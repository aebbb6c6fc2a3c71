"""The README's Python runs, and what it says of the project is so."""

import re
import runpy

import matplotlib.style
import pytest

from markdown_pages import ROOT, broken_links, python_blocks, run_block

PAGE = ROOT / "README.md"
README, BLOCKS = PAGE.read_text(), python_blocks(PAGE)


def test_it_is_short_and_has_a_block_of_each_kind():
    assert len(README.split()) <= 1200
    assert len(BLOCKS) == 5
    assert max(len(block.strip().splitlines()) for block in BLOCKS) <= 12


@pytest.mark.parametrize(
    "block", BLOCKS, ids=["linen", "functional", "nnx", "autotune", "loss"]
)
def test_example_runs(block):
    run_block(block, PAGE)


def test_each_command_is_one_line_with_its_own_environment():
    commands = re.findall(r"<!-- \w+ -->\n```sh\n(.*?)```", README, re.S)
    assert len(commands) == 2
    for command in commands:
        assert len(command.strip().splitlines()) == 1
        assert command.startswith("python3 -m venv")


def test_the_oldest_pair_is_that_of_the_metadata():
    jax, flax = re.search(r"JAX >= ([\d.]+) and Flax >= ([\d.]+\d)", README).groups()
    assert f'"jax>={jax}", "flax>={flax}"' in (ROOT / "pyproject.toml").read_text()


def test_links_lead_somewhere():
    assert broken_links(PAGE) == []


def test_its_pictures_are_those_of_the_script(tmp_path, monkeypatch):
    script = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    monkeypatch.setitem(script["main"].__globals__, "OUT", tmp_path)
    with matplotlib.style.context("default"):
        script["main"]()
    drawn = {f"docs/pictures/{path.name}" for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"!\[[^]]+\]\((docs/[^)]+)\)", README))
    for path in tmp_path.iterdir():
        committed = ROOT / "docs" / "pictures" / path.name
        assert abs(path.stat().st_size / committed.stat().st_size - 1) < 0.2
