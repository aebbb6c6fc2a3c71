"""What a user gets by installing and importing."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import tdjax

ROOT = Path(__file__).parent.parent
HEAVY = ("flax", "optax", "orbax", "keras", "matplotlib", "rich")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_loads_neither_flax_nor_optax():
    code = f"import sys, tdjax; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_adapters_load_when_asked_for(adapter):
    code = f"import sys, tdjax; tdjax.{adapter}.TimeDistributed; print('flax' in sys.modules)"
    assert run(code) == "True"
    assert adapter in dir(tdjax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'keras_layers'"):
        _ = tdjax.keras_layers


def test_the_version_stands_in_one_place():
    assert metadata.version("tdjax") == tdjax.__version__
    assert f'"{tdjax.__version__}"' not in (ROOT / "pyproject.toml").read_text()
    assert f"## {tdjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_core_needs_no_more_than_jax_flax_and_jaxtyping():
    needed = [r for r in metadata.requires("tdjax") or [] if "extra ==" not in r]
    assert {r.split(">=")[0] for r in needed} == {"jax", "flax", "jaxtyping"}


def test_the_types_are_marked():
    assert (Path(tdjax.__file__).parent / "py.typed").exists()
