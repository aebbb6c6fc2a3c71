"""What is collected: the Keras adapter and its tests need Keras, an extra."""

import importlib.util
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

if importlib.util.find_spec("keras") is None:
    collect_ignore_glob = ["src/tdjax/keras.py", "src/tdjax/_keras_*.py", "tests/parity/*"]
