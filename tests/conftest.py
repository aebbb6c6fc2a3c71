"""How the tests run, and their fixtures."""

import importlib.util
import os

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

# Tests compile much and compute little: half of the time is LLVM's, for nothing.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    # Newer versions of XLA compile fast without it, and don't know it.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

# Keras, an extra, computes with JAX if it is there.
os.environ.setdefault("KERAS_BACKEND", "jax")
if importlib.util.find_spec("keras") is None:
    needs_keras = ["parity", "examples/test_from_keras.py"]
    collect_ignore = [*needs_keras, "keras_pairs.py", "keras_zoo.py"]

# Each example may compile; a compilation has no deadline.
settings.register_profile("tdjax", deadline=None, max_examples=12, derandomize=True)
settings.load_profile("tdjax")
# For tests/fuzz: other examples at each run.
settings.register_profile(
    "fuzz",
    settings.get_profile("default"),
    deadline=None,
    derandomize=False,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=[*HealthCheck],
)


@pytest.fixture
def user_errors():
    """Switches the test run's type checks off, so that our own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    return jax.random.key(7)
