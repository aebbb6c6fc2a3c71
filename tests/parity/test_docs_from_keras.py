"""The page for Keras users: its Python runs, and what it says is so."""

import pytest

from markdown_pages import ROOT, broken_links, python_blocks, run_block

PAGE = ROOT / "docs/from_keras.md"
BLOCKS = python_blocks(PAGE)


def test_every_block_of_python_is_run_here():
    assert len(BLOCKS) == PAGE.read_text().count("```python\n") == 11


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block(block, PAGE)


def test_links_lead_somewhere():
    assert broken_links(PAGE) == []
