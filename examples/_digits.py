"""Handwritten digits as sequences: eight rows of eight pixels, from top to bottom.

They come with scikit-learn (https://archive.ics.uci.edu/dataset/80).
"""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

ROWS = PIXELS = 8
CLASSES = 10
HELD_OUT = 397

Digits = tuple[np.ndarray, np.ndarray]


def read_digits() -> tuple[Digits, Digits]:
    """Training and held-out `(images, labels)`: `(n, rows, pixels)` and `(n,)`.

    The held-out digits are the last of the file, for those that stand close together
    look alike: shuffled, the task is much easier.
    """
    digits: Any = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    train, held_out = slice(-HELD_OUT), slice(-HELD_OUT, None)
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def majority_accuracy(train: Digits, held_out: Digits) -> float:
    """Held-out accuracy of always answering the most frequent digit of training."""
    return float(np.mean(held_out[1] == np.bincount(train[1]).argmax()))


def logistic_regressions(train: Digits, held_out: Digits) -> list[float]:
    """Held-out accuracy after each row, each of a regression on the pixels so far."""
    # So small products are slower on several threads, far slower if cores are busy.
    with threadpool_limits(1):
        return [_regression(train, held_out, rows) for rows in range(1, ROWS + 1)]


def _regression(train: Digits, held_out: Digits, rows: int) -> float:
    seen = [
        images[:, :rows].reshape(len(images), -1) for images, _ in (train, held_out)
    ]
    # Less regularised than by default: a better baseline here.
    model = LogisticRegression(C=10, max_iter=1000).fit(seen[0], train[1])
    return float(model.score(seen[1], held_out[1]))
