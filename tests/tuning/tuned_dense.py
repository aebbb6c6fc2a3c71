"""What the tests of the tuner share: a small problem and a short search."""

import tdjax
from helpers import normal

QUICK = {
    "budget": 60.0,
    "candidates": [{"method": "fold"}, {"chunk_size": 2}, {"chunk_size": 1}],
}
X = normal(0, 3, 6, 4)


def tune_dense(params, **options):
    options = {**QUICK, **options}
    return tdjax.autotune(tdjax.dense, params, X, in_axes=(None, 1), **options)
