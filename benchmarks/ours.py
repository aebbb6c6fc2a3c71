"""tdjax in the same seat as its peers: pure functions, Flax layers, tuned."""

from flax import nnx

import tdjax
from benchmarks.candidate import Candidate
from benchmarks.cases import Case
from benchmarks.flax_layers import flax_params, linen_layer, nnx_layer, with_params
from benchmarks.layers import LAYERS, whole


def fixed(case: Case) -> list[Candidate]:
    """The two methods, and both adapters with the default method."""
    return [
        transform(case, "time_distributed"),
        transform(case, 'time_distributed, "fold"', method="fold"),
        _linen(case),
        _nnx(case),
    ]


def transform(case: Case, name: str, **options) -> Candidate:
    """`time_distributed` of the plain function, with the given lowering."""
    over_time = lambda step: tdjax.time_distributed(step, in_axes=(None, 1), **options)
    return Candidate(name, whole(case.layer, over_time))


def tune(case: Case, of: str, budget: float, **limits) -> tdjax.Tuning:
    """The tuner on the step of a case."""
    params = case.params["head"] if case.layer == "GRU and head" else case.params
    argnums = (0, 1) if of == "gradient" else None
    return tdjax.autotune(
        LAYERS[case.layer].step, params, case.x,
        in_axes=(None, 1), argnums=argnums, budget=budget, **limits,
    )  # fmt: skip


def _linen(case: Case) -> Candidate:
    model = tdjax.linen.TimeDistributed(linen_layer(case))
    over_time = lambda step: lambda params, x: model.apply({"params": params}, x)
    return Candidate("tdjax.linen", whole(case.layer, over_time), flax_params(case))


def _nnx(case: Case) -> Candidate:
    def apply(params, x):
        layer = with_params(nnx_layer(case, nnx.Rngs(0)), params)
        return tdjax.nnx.TimeDistributed(layer)(x)

    return Candidate(
        "tdjax.nnx", whole(case.layer, lambda step: apply), flax_params(case)
    )
