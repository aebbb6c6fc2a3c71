"""Films of handwritten digits that move, of different lengths and with lost pixels."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

DIGITS = 10
WAYS = {"↑": (-1, 0), "↓": (1, 0), "←": (0, -1), "→": (0, 1)}
LABELS = DIGITS * len(WAYS)

SHORTEST, LONGEST = 2, 9
CANVAS, SIZE = 16, 8
FASTEST = 3
LOST = 0.2
HELD_OUT_IMAGES = 297


class Films(NamedTuple):
    """Films, padded with black frames.

    `frames` is `(films, LONGEST, CANVAS, CANVAS)`, from 0 to 255; `lengths` and
    `labels` are `(films,)`. A label is `digit * len(WAYS) + way`.
    """

    frames: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def moving_digits() -> tuple[Films, Films]:
    """Training and held-out films, which have no image in common.

    scikit-learn brings the images along. Each goes every way, in a film of its own.
    """
    images, digits = load_digits(return_X_y=True)
    images = images.reshape(-1, SIZE, SIZE) * (255 / images.max())
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(images))
    train, held_out = rows[HELD_OUT_IMAGES:], rows[:HELD_OUT_IMAGES]
    return (
        _films(rng, images[train], digits[train]),
        _films(rng, images[held_out], digits[held_out]),
    )


def _films(rng: np.random.Generator, images: np.ndarray, digits: np.ndarray) -> Films:
    ways = np.tile(np.arange(len(WAYS)), len(images))
    images, digits = (np.repeat(x, len(WAYS), axis=0) for x in (images, digits))
    lengths = rng.integers(SHORTEST, LONGEST + 1, len(ways), dtype=np.int32)
    frames = np.zeros((len(ways), LONGEST, CANVAS, CANVAS), np.uint8)
    for padded, image, way, length in zip(frames, images, ways, lengths):
        padded[:length] = lose_pixels(rng, film(rng, image, way, length))
    labels = digits * len(WAYS) + ways
    return Films(frames, lengths, labels.astype(np.int32))


def film(
    rng: np.random.Generator, image: np.ndarray, way: int, length: int
) -> np.ndarray:
    """`(length, CANVAS, CANVAS)`: the image at any place and speed, going one way.

    All of it stays on the canvas. All that fit are as likely, so a film backwards is as
    likely as one of the opposite way.
    """
    room, steps = CANVAS - SIZE, length - 1
    speed = rng.integers(1, min(FASTEST, room // steps) + 1)
    path = speed * np.array([*WAYS.values()][way]) * np.arange(length)[:, None]
    start = rng.integers(-path.min(0), room - path.max(0) + 1)
    frames = np.zeros((length, CANVAS, CANVAS))
    for frame, (row, column) in zip(frames, start + path):
        frame[row : row + SIZE, column : column + SIZE] = image
    return frames


def lose_pixels(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Blackens a share of the pixels, other ones in every frame."""
    return np.where(rng.random(frames.shape) < LOST, 0, frames)


def label_name(label: int) -> str:
    """As `7→`."""
    digit, way = divmod(label, len(WAYS))
    return f"{digit}{[*WAYS][way]}"
