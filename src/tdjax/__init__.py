"""Apply any JAX function or Flax layer to every step of a sequence.

The pure functions live here and need only JAX. The Flax layers are in
`tdjax.linen` and `tdjax.nnx`, and what is for Keras 3 in `tdjax.keras`; they are loaded
when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING

from tdjax.analysis import step_influence as step_influence
from tdjax.dense import as_flatten as as_flatten
from tdjax.dense import as_per_step as as_per_step
from tdjax.dense import dense as dense
from tdjax.dense import flatten_dense as flatten_dense
from tdjax.dense import init_dense as init_dense
from tdjax.dense import init_flatten_dense as init_flatten_dense
from tdjax.dense import init_per_step_dense as init_per_step_dense
from tdjax.dense import per_step_dense as per_step_dense
from tdjax.losses import linear_cross_entropy as linear_cross_entropy
from tdjax.masking import lengths_to_mask as lengths_to_mask
from tdjax.masking import masked_mean as masked_mean
from tdjax.time_distributed import time_distributed as time_distributed
from tdjax.tuning import Tuning as Tuning
from tdjax.tuning import autotune as autotune

if TYPE_CHECKING:
    from tdjax import keras as keras
    from tdjax import linen as linen
    from tdjax import nnx as nnx

__version__ = "0.1.0"

_ADAPTERS = ("keras", "linen", "nnx")
__all__ = [
    "Tuning",
    "as_flatten",
    "as_per_step",
    "autotune",
    "dense",
    "flatten_dense",
    "init_dense",
    "init_flatten_dense",
    "init_per_step_dense",
    "lengths_to_mask",
    "linear_cross_entropy",
    "linen",
    "masked_mean",
    "nnx",
    "per_step_dense",
    "step_influence",
    "time_distributed",
]


def __getattr__(name: str):
    # Flax takes longer to import than everything else together.
    if name in _ADAPTERS:
        return importlib.import_module(f"tdjax.{name}")
    raise AttributeError(f"module 'tdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ADAPTERS})
