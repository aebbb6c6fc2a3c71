"""A linear model of a text's trigrams: what can be done without reading in order."""

import numpy as np

# Trigrams share this many features, by their remainder; a prime spreads them.
BUCKETS = 1021


def linear_baseline(
    texts: np.ndarray, targets: np.ndarray, held_out: np.ndarray, symbols: int
) -> np.ndarray:
    """Least squares from which trigrams a text has to each symbol of its target.

    Args:
      texts: `(examples, time)`, symbols.
      targets: `(examples, target_time)`, symbols.
      held_out: `(held_out, time)`, texts to predict the targets of.
      symbols: how many there are.

    Returns:
      `(held_out, target_time)`, symbols.
    """
    x = _present(texts, symbols)
    y = np.eye(symbols, dtype=np.float32)[targets].reshape(len(x), -1)
    # A weight of 1 for small coefficients, as for features that no text has.
    kernel = np.linalg.solve(x.T @ x + np.eye(BUCKETS, dtype=np.float32), x.T @ y)
    scores = _present(held_out, symbols) @ kernel
    return scores.reshape(len(held_out), -1, symbols).argmax(-1)


def _present(texts: np.ndarray, symbols: int) -> np.ndarray:
    """`(examples, BUCKETS)`: 1 where a text has such a trigram."""
    first, second, third = texts[:, :-2], texts[:, 1:-1], texts[:, 2:]
    buckets = ((first * symbols + second) * symbols + third) % BUCKETS
    present = np.zeros((len(texts), BUCKETS), np.float32)
    present[np.arange(len(texts))[:, None], buckets] = 1
    return present
