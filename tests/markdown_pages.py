"""Pages of documentation: their Python runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python that are whole programs: they import what they use."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    return [block for block in blocks if "import" in block]


def run_block(block: str, page: Path) -> None:
    for library in ("haiku", "equinox"):
        if f"import {library}" in block:
            pytest.importorskip(library)
    exec(compile(block, page.name, "exec"), {})


def broken_links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    return [target for target in targets if not (page.parent / target).exists()]
