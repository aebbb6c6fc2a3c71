"""Links to the site's pages, and its map of the source, are right.

The build of the site runs its code and checks its own links (`.ci/steps docs`).
"""

import re

from markdown_pages import ROOT, broken_links

DOCS = ROOT / "docs"
MAP = (DOCS / "source.md").read_text()


def anchors(page):
    """Those that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_links_from_page_to_page_lead_somewhere():
    for page in DOCS.glob("*.md"):
        assert broken_links(page) == [], page.name


def test_docstrings_and_pages_link_to_sections_that_exist():
    pages = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.md"), *DOCS.glob("*.md")]
    links = {
        link
        for page in pages
        for link in re.findall(r"\b(\w+)\.md#([\w-]+)", page.read_text())
    }
    assert ("masks", "packing") in links
    for name, anchor in links:
        assert anchor in anchors(DOCS / f"{name}.md"), f"{name}.md#{anchor}"


def test_docstrings_name_pages_that_exist():
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    pages = set(re.findall(r"docs/(\w+\.md)", sources))
    assert len(pages) >= 5
    for page in pages:
        assert (DOCS / page).exists(), page


def test_the_map_names_files_and_functions_that_exist():
    source = ROOT / "src" / "tdjax"
    for name in re.findall(r"`(_\w+(?:/\w+)*\.py)`", MAP):
        assert (source / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", MAP):
        assert list(source.rglob(name)), name
    sources = "".join(path.read_text() for path in source.rglob("*.py"))
    parts = re.findall(r"`(?!jax\.)([\w.]+)`", MAP)
    names = {part.rpartition(".")[2] for part in parts} - {"py", "tdjax"}
    assert {"fold_block", "MaskedSteps", "after_steps", "to_flax"} <= names
    for name in names:
        is_module = list(source.rglob(f"{name}.py"))
        is_defined = rf"(def|class) {name}\b|^ *{name} *[=:]"
        assert is_module or re.search(is_defined, sources, re.M), name
