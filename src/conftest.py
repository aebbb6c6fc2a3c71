"""The doctests of the Keras adapter need Keras, which is an extra."""

import importlib
import importlib.util
import os
import pkgutil

HAS_KERAS = importlib.util.find_spec("keras") is not None
# Keras computes with JAX here.
os.environ.setdefault("KERAS_BACKEND", "jax")
if not HAS_KERAS:
    collect_ignore_glob = ["tdjax/keras.py", "tdjax/_keras/*"]


def pytest_sessionstart():
    """Imports all modules before pytest does: it would import some twice.

    What a test changes in the one would not be changed in the other.
    """
    import tdjax

    for module in pkgutil.walk_packages(tdjax.__path__, "tdjax."):
        if HAS_KERAS or "keras" not in module.name:
            importlib.import_module(module.name)
