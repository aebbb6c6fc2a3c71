"""Every peer: `candidate(layer)` gives its model, in its own best style.

A peer that is not installed is listed as missing. Each file imports its library when it
is asked for a model, not before.
"""

import importlib

from benchmarks.candidate import Candidate
from benchmarks.cases import Case

NAMES = (
    "raw",
    "jax_vmap",
    "haiku_batch_apply",
    "equinox_vmap",
    "flax_linen_vmap",
    "flax_batch_apply",
    "flax_nnx_vmap",
    "keras_time_distributed",
    "torch_folded",
    "torch_compiled",
)


def make(name: str, case: Case) -> Candidate:
    """The peer's candidate for a case; ImportError or NotImplementedError if none."""
    return importlib.import_module(f"benchmarks.peers.{name}").candidate(case)


def keras_module():
    """Keras' own file, for the suite that compiles it at many lengths."""
    return importlib.import_module("benchmarks.peers.keras_time_distributed")
