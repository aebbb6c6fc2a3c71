"""The doctests of the Keras adapter need Keras, which is an extra."""

import importlib.util

if importlib.util.find_spec("keras") is None:
    collect_ignore_glob = ["tdjax/keras.py", "tdjax/_keras/*"]
