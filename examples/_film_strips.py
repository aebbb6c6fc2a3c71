"""Held-out films as strips, with what a model says of them."""

import numpy as np
from matplotlib.figure import Figure

from _display import new_figure
from _moving_digits import CANVAS, LONGEST, SHORTEST, Films, label_name


def film_strips(films: Films, answers: np.ndarray) -> Figure:
    """A film of every length, frame by frame, and what the model says."""
    lengths = range(SHORTEST, LONGEST + 1)
    # From different parts of the films: neighbours are of one image.
    rows = [
        np.flatnonzero(films.lengths == length)[5 * place]
        for place, length in enumerate(lengths)
    ]
    figure = new_figure(7, 7)
    for axes, row in zip(figure.subplots(len(rows), 1), rows):
        framed = np.pad(films.frames[row], ((0, 0), (0, 0), (0, 1)))
        strip = np.concatenate([*framed], axis=1).astype(float)
        strip[:, CANVAS :: CANVAS + 1] = 255
        strip[:, films.lengths[row] * (CANVAS + 1) :] = 255
        axes.imshow(strip, cmap="gray")
        axes.set_axis_off()
        right = answers[row] == films.labels[row]
        true, answer = (label_name(int(x[row])) for x in (films.labels, answers))
        axes.set_title(
            f"{true}, said {answer}", loc="left", color="green" if right else "red"
        )
    return figure
