"""Where a decoder looks while it writes."""

from pathlib import Path

import numpy as np

from _display import new_figure, save_figure


def save_attention(path: Path, weights: np.ndarray, source: str, target: str) -> None:
    """A row for each character of the target, dark where it looks in the source.

    Args:
      path: of the PNG.
      weights: `(target_time, source_time)`, at least as many as there are characters.
      source: the text that was read.
      target: the text that was written.
    """
    figure = new_figure(1 + 0.16 * len(source), 1 + 0.16 * len(target))
    axes = figure.subplots()
    shown = weights[: len(target), : len(source)]
    axes.imshow(shown, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    style = {"family": "monospace", "fontsize": 9}
    axes.set_xticks(range(len(source)), list(source), **style)
    axes.set_yticks(range(len(target)), list(target), **style)
    axes.tick_params(length=0)
    axes.set(xlabel="reads", ylabel="writes")
    save_figure(path, figure)
