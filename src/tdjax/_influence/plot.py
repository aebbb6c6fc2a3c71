"""A picture of which output step depends on which input step."""

from typing import Any

import numpy as np

from tdjax._checks import describe

# Both can be told apart on a light and on a dark page.
_DEPENDS, _INDEPENDENT = "#1f6feb", "#9aa4b2"


def plot_step_influence(influence: Any, *, ax: Any = None, title: str = "") -> Any:
    """Draws what `step_influence` returned: a square for True, a dot for False.

    Needs Matplotlib: `pip install "tdjax[plot]"`.

    Args:
      influence: bool, `(out_steps, in_steps)`.
      ax: the Matplotlib axes to draw on; None for a new figure.
      title: shown above.

    Returns:
      The Matplotlib axes, with outputs from top to bottom and inputs from left to
      right. `ax.figure.savefig("influence.svg")` saves the picture.

    Raises:
      ImportError: if Matplotlib is not installed.
      ValueError: if `influence` has not two axes.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> causal = tdjax.step_influence(lambda x: jnp.cumsum(x, 1), jnp.ones((1, 4, 2)))
      >>> ax = tdjax.plot_step_influence(causal, title="a running sum")
    """
    influence = np.asarray(influence)
    if influence.ndim != 2:
        raise ValueError(
            "influence must be what step_influence returns, (out_steps, in_steps), got "
            f"{describe(influence)}."
        )
    try:
        from matplotlib import patches, pyplot
    except ImportError as error:
        raise ImportError(
            'plot_step_influence needs Matplotlib: pip install "tdjax[plot]".'
        ) from error
    if ax is None:
        ax = pyplot.subplots(figsize=(3, 3), layout="constrained")[1]
    for y, x in np.ndindex(influence.shape):
        if influence[y, x]:
            mark = patches.Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, color=_DEPENDS)
        else:
            mark = patches.Circle((x, y), 0.08, color=_INDEPENDENT)
        ax.add_patch(mark)
    rows, columns = influence.shape
    ax.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")
    ax.set(xlabel="input step", ylabel="output step", title=title)
    ax.locator_params(integer=True)
    return ax
