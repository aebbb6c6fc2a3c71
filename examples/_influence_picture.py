"""Pictures of which hour depends on which: what may be, and what was learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import tdjax
from _display import new_figure, save_figure
from _station import HOURS, SENSORS, TARGETS


def save_picture(path: Path, families: Mapping[str, nn.Module], params: Any) -> None:
    """Above what each family may depend on, below what the flattened one learned."""
    figure = new_figure(9, 6)
    panels: Any = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (family, model) in zip(panels[0], families.items()):
        depends = influence(model, params[TARGETS[0]][family])
        axes.imshow(depends, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"{family}:\nmay depend on")
    for axes, target in zip(panels[1], TARGETS):
        weights = learned(params[target]["flattened"])
        image = axes.imshow(weights, cmap="magma", vmin=0)
        axes.set_title(f"flattened, {target}:\nlearned weights")
        figure.colorbar(image, ax=axes, shrink=0.8)
    for axes in panels[1]:
        axes.set_xlabel("hour of the input")
    for axes in panels[:, 0]:
        axes.set_ylabel("hour of the output")
    save_figure(path, figure)


def influence(model: nn.Module, variables: Any) -> np.ndarray:
    """`(hours out, hours in)`, bool."""
    day = jax.ShapeDtypeStruct((1, HOURS, SENSORS), jnp.float32)
    return tdjax.step_influence(lambda x: model.apply(variables, x), day)


def learned(variables: Any) -> np.ndarray:
    """`(hours out, hours in)`: the norm of the weights from one to the other."""
    kernel = np.asarray(variables["params"]["kernel"])
    return np.linalg.norm(kernel.reshape(HOURS, SENSORS, HOURS), axis=1).T
