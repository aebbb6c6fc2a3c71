"""The guide's Python runs, and its links and those that lead to it are right."""

import re

import pytest

from markdown_pages import ROOT, broken_links, python_blocks, run_block

PAGE = ROOT / "docs" / "guide.md"
TEXT, BLOCKS = PAGE.read_text(), python_blocks(PAGE)
ANCHORS = set(re.findall(r'<a id="(\w+)"></a>', TEXT))


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block):
    run_block(block, PAGE)


def test_links_lead_somewhere():
    assert broken_links(PAGE) == []
    assert set(re.findall(r"\]\(#(\w+)\)", TEXT)) <= ANCHORS


def test_docstrings_and_pages_link_to_sections_that_exist():
    pages = [
        *(ROOT / "src").rglob("*.py"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
    texts = [page.read_text() for page in pages]
    links = {link for text in texts for link in re.findall(r"guide\.md#(\w+)", text)}
    assert links
    assert links <= ANCHORS


def test_the_map_names_files_and_functions_that_exist():
    section = TEXT[TEXT.index('<a id="map">') :]
    source = ROOT / "src" / "tdjax"
    for name in re.findall(r"`(_\w+(?:/\w+)*\.py)`", section):
        assert (source / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", section):
        assert list(source.rglob(name)), name
    sources = "".join(path.read_text() for path in source.rglob("*.py"))
    parts = re.findall(r"`(?!jax\.)([\w.]+)`", section)
    names = {part.rpartition(".")[2] for part in parts} - {"py", "tdjax"}
    assert {"fold_block", "MaskedSteps", "_after_steps", "to_flax"} <= names
    for name in names:
        is_module = list(source.rglob(f"{name}.py"))
        is_defined = rf"(def|class) {name}\b|^ *{name} *[=:]"
        assert is_module or re.search(is_defined, sources, re.M), name
