"""Examples in batches: in which order to train on them, and all of them in turn.

A set of examples is any pytree of arrays whose first axis counts the examples.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from _options import Settings


def count(examples: Any) -> int:
    return len(jax.tree.leaves(examples)[0])


def take(examples: Any, rows: np.ndarray | slice) -> Any:
    return jax.tree.map(lambda array: array[rows], examples)


def fingerprint(examples: Any) -> str:
    """Tells whether a run goes on with the data that it began with."""
    arrays = jax.tree.leaves(examples)
    return f"{zlib.crc32(b''.join(np.asarray(x).tobytes() for x in arrays)):08x}"


def batch_rows(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """The examples of one step: a pure function, so a resumed run needs no iterator.

    Every epoch is a permutation of all `count` examples; a batch may span two epochs.
    """
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), count)
    return np.array([_order(seed, int(e), count)[p] for e, p in zip(epochs, places)])


def most_steps(lengths: np.ndarray, settings: Settings) -> int:
    """The steps in the batch of a run that has the most: a capacity that always holds.

    Args:
      lengths: `(examples,)`, the steps of each training example.
      settings: of the run, whose batches are known before it begins.
    """
    rows = (
        batch_rows(settings.seed, step, settings.batch_size, len(lengths))
        for step in range(settings.steps)
    )
    return max(int(lengths[batch].sum()) for batch in rows)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def in_batches(fun: Callable[[Any], Any], examples: Any, batch_size: int) -> Any:
    """`fun` of all examples, as NumPy arrays, in batches of one size.

    So a jitted `fun` is compiled once. Its results have the examples as their first
    axis too.
    """
    total = count(examples)
    # The last batch is filled up with examples from the start, which are cut off again.
    rows = np.arange(-(-total // batch_size) * batch_size) % total
    parts = [fun(take(examples, batch)) for batch in rows.reshape(-1, batch_size)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:total], *parts)
