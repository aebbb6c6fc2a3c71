"""What a user gets by installing and importing."""

import ast
import importlib
import importlib.util
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import tdjax

ROOT = Path(__file__).parent.parent
# Of what is imported, which may be an installed package.
SOURCE = Path(tdjax.__file__).parent
MODULES = {
    "tdjax." + ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in SOURCE.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
HAS_KERAS = importlib.util.find_spec("keras") is not None
PUBLIC = ["tdjax", "tdjax.linen", "tdjax.nnx", *["tdjax.keras"] * HAS_KERAS]
# As if Keras were not installed, or its backend not set and TensorFlow not installed.
WITHOUT_KERAS = """
import os, sys
os.environ.pop("KERAS_BACKEND", None)
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        missing = name.split(".")[0] in {missing}
        return None if missing else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
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


@tdjax.time_distributed
def decorated(x):
    return x


@pytest.mark.parametrize("name", PUBLIC)
def test_all_and_dir_are_the_public_names(name):
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        if public in ("linen", "nnx", "keras"):
            assert value.__name__ == f"tdjax.{public}"
        elif public != "FlaxModel":  # is unpickled without Keras
            assert (value.__module__, value.__qualname__) == (name, public)


def test_public_functions_are_pickled_by_their_public_names():
    for name in tdjax.__all__:
        value = getattr(tdjax, name)
        if callable(value):
            assert pickle.loads(pickle.dumps(value)) is value
    over_time = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
    assert pickle.loads(pickle.dumps(over_time)).fun is tdjax.dense
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert b"tdjax._dense" not in pickle.dumps(tdjax.dense)


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("TimeDistributed", ("linen", "nnx", "keras")),
        ("FlattenDense", ("linen", "nnx")),
        ("PerStepDense", ("linen", "nnx")),
    ],
)
def test_the_adapter_to_take_is_named(name, adapters):
    with pytest.raises(AttributeError) as raised:
        getattr(tdjax, name)
    code = f"""
try:
    from tdjax import {name}
except ImportError as error:
    print(error)
"""
    for text in (str(raised.value), run(code)):
        for adapter in adapters:
            assert f"tdjax.{adapter}.{name} for " in text
    assert not hasattr(tdjax, name)
    with pytest.raises(ImportError, match="cannot import name 'Dense'"):
        exec("from tdjax import Dense")


@pytest.mark.parametrize("missing", [("keras",), ("tensorflow",)])
def test_help_works_without_keras_or_its_backend(missing):
    code = (
        WITHOUT_KERAS.format(missing=missing)
        + """
import inspect, pydoc, tdjax
assert "keras" not in dir(tdjax)
assert "dense" in dict(inspect.getmembers(tdjax))
text = pydoc.plain(pydoc.render_doc(tdjax))
assert "time_distributed(" in text, text[:1000]
from tdjax import *
assert dense and linen and nnx
try:
    import tdjax.keras
except ModuleNotFoundError as error:
    assert "KERAS_BACKEND=jax" in str(error)
else:
    assert False
print("ok")
"""
    )
    if missing == ("tensorflow",) and not HAS_KERAS:
        pytest.skip("Keras is not installed")
    assert run(code).endswith("ok")


def test_only_the_package_and_its_adapters_are_public():
    flat = {path.name for path in SOURCE.glob("*.py")}
    assert {name for name in flat if not name.startswith("_")} == {
        "linen.py",
        "nnx.py",
        "keras.py",
    }
    assert len({name for name in flat if name.startswith("_")}) <= 9  # and __init__
    folders = {path.parent.relative_to(SOURCE).parts for path in MODULES.values()}
    assert all(parts[0].startswith("_") for parts in folders if parts)
    assert max(len(path.read_text().splitlines()) for path in MODULES.values()) <= 400


def imports_of(path):
    """The modules that a file imports when it is loaded."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.FunctionDef)
        or (isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test))
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def test_no_module_imports_itself_over_others():
    arrows = {
        name: {other for other in imports_of(path) if other in MODULES} - {name}
        for name, path in MODULES.items()
    }
    while arrows:
        leaves = {name for name, others in arrows.items() if not others}
        assert leaves, f"a cycle among {sorted(arrows)}"
        arrows = {
            name: others - leaves
            for name, others in arrows.items()
            if name not in leaves
        }


def test_private_modules_import_no_adapter():
    allowed = {"tdjax._keras.modules.time"}  # is a subclass of tdjax.linen's
    for name, path in MODULES.items():
        if name.startswith("tdjax._") and name not in allowed:
            assert not {"tdjax.linen", "tdjax.nnx", "tdjax.keras"} & {*imports_of(path)}


def test_the_flax_modules_know_nothing_of_keras():
    inside = [name for name in MODULES if name.startswith("tdjax._keras.modules")]
    allowed = ("tdjax._keras.modules", "tdjax.linen", "tdjax._checks")
    for name in inside:
        for other in imports_of(MODULES[name]):
            assert other.split(".")[0] != "keras", name
            assert not other.startswith("tdjax") or other.startswith(allowed), name
    load = "".join(f"import {name}\n" for name in inside)
    code = WITHOUT_KERAS.format(missing=("keras",)) + load
    assert run(code + "print('keras' in sys.modules)") == "False"


@pytest.mark.slow
def test_modules_named_beside_their_tests_are_imported_once(tmp_path):
    test = tmp_path / "test_modules.py"
    test.write_text(
        "import sys\n\n"
        "def test_each_module_is_an_attribute_of_its_package():\n"
        "    names = [name for name in sys.modules if name.startswith('tdjax.')]\n"
        "    assert len(names) > 9\n"
        "    for name in names:\n"
        "        package, _, module = name.rpartition('.')\n"
        "        assert getattr(sys.modules[package], module) is sys.modules[name]\n"
    )
    tested = str(SOURCE / "_steps/fold.py"), str(test)
    if not (ROOT / "src/conftest.py").exists():
        pytest.skip("these are the tests of an installed package")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *tested]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
