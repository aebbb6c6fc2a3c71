"""Apply any JAX function or Flax layer to every step of a sequence.

The pure functions live here and need only JAX. The layers live in `tdjax.linen`,
`tdjax.nnx` and `tdjax.keras`, each loaded when it is first asked for.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tdjax._cross_entropy.log_probs import linear_log_probs
from tdjax._cross_entropy.loss import linear_cross_entropy
from tdjax._dense import (
    as_flatten,
    as_per_step,
    dense,
    flatten_dense,
    init_dense,
    init_flatten_dense,
    init_per_step_dense,
    per_step_dense,
)
from tdjax._influence.plot import plot_step_influence
from tdjax._influence.step_influence import assert_causal, step_influence
from tdjax._masks import lengths_to_mask, masked_mean
from tdjax._steps.places import set_default as _set_default
from tdjax._steps.transform import time_distributed
from tdjax._tuning.autotune import autotune
from tdjax._tuning.on_miss import tuning
from tdjax._tuning.result import Tuning
from tdjax._tuning.shipped import Shipped as _Shipped

if TYPE_CHECKING:
    from tdjax import keras as keras
    from tdjax import linen as linen
    from tdjax import nnx as nnx

__version__ = "0.1.0"

__all__ = [
    "Tuning",
    "as_flatten",
    "as_per_step",
    "assert_causal",
    "autotune",
    "dense",
    "flatten_dense",
    "init_dense",
    "init_flatten_dense",
    "init_per_step_dense",
    "lengths_to_mask",
    "linear_cross_entropy",
    "linear_log_probs",
    "linen",
    "masked_mean",
    "nnx",
    "per_step_dense",
    "plot_step_influence",
    "step_influence",
    "time_distributed",
    "tuning",
]
_set_default(_Shipped())

# Whoever lists or imports all names must not fail for want of Keras on JAX.
if os.environ.get("KERAS_BACKEND") == "jax" and find_spec("keras"):
    __all__ += ["keras"]

_ADAPTERS = ("keras", "linen", "nnx")
_LAYERS = ("CrossEntropyHead", "FlattenDense", "PerStepDense", "TimeDistributed")

# Tracebacks, pickles and documentation name the place where users find a name.
for _name in __all__:
    if _name not in _ADAPTERS:
        globals()[_name].__module__ = __name__


def __getattr__(name: str):
    # Flax takes longer to import than everything else together.
    if name in _ADAPTERS:
        return importlib.import_module(f"tdjax.{name}")
    if name in _LAYERS:
        message = (
            f"tdjax has layers for each framework: take tdjax.linen.{name} for Flax "
            f"Linen or tdjax.nnx.{name} for Flax NNX. There are "
            "tdjax.keras.TimeDistributed for Keras and tdjax.time_distributed for "
            "functions."
        )
        # `from tdjax import ...` would replace the message of an AttributeError.
        is_import = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        raise (ImportError if is_import else AttributeError)(message)
    raise AttributeError(f"module 'tdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
