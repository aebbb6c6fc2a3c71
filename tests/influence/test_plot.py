"""The picture of `step_influence`."""

import sys

import matplotlib
import numpy as np
import pytest

import tdjax

matplotlib.use("Agg")
from matplotlib import patches, pyplot


def test_true_is_a_square_and_false_a_dot_rows_are_outputs():
    influence = np.array([[True, False, False], [True, True, False]])
    ax = tdjax.plot_step_influence(influence, title="two of three")
    squares = [p for p in ax.patches if isinstance(p, patches.Rectangle)]
    dots = [p for p in ax.patches if isinstance(p, patches.Circle)]
    places = {tuple(np.round(p.get_center()).astype(int)) for p in squares}
    assert places == {(0, 0), (0, 1), (1, 1)}
    assert len(dots) == 3
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first output is on top
    # On the left in the style of the project, which another test may have set.
    assert "two of three" in (ax.get_title(), ax.get_title(loc="left"))
    pyplot.close(ax.figure)


def test_it_draws_on_given_axes():
    figure, ax = pyplot.subplots()
    assert tdjax.plot_step_influence(np.eye(2), ax=ax) is ax
    figure.canvas.draw()
    pyplot.close(figure)


def test_errors(user_errors, monkeypatch):
    with pytest.raises(
        ValueError, match=r"must be what step_influence returns, .* bool\[3\]"
    ):
        tdjax.plot_step_influence(np.ones(3, bool))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "tdjax\[plot\]"'):
        tdjax.plot_step_influence(np.eye(2))
