"""Which steps are computed: all of them, all but hidden where masked, or packed."""

from typing import Any

import numpy as np

from tdjax._checks import describe, is_concrete
from tdjax._masks import require_mask_dtype
from tdjax._steps.axes import Inputs, batch_size, time_size
from tdjax._steps.lowering import Lowering
from tdjax._steps.masked import MaskedSteps, require_values
from tdjax._steps.packed import PackedSteps
from tdjax._steps.steps import AllSteps, Steps


def select_steps(inputs: Inputs, mask, lowering: Lowering) -> Steps:
    """The steps to compute, after checking that the mask fits them."""
    capacity, time_major = lowering.capacity, is_time_major(inputs)
    if mask is None:
        if capacity is not None:
            raise ValueError(
                f"capacity={capacity} needs a mask that says which steps are valid: "
                f"call with mask=, bool, {_LAYOUT[time_major]}."
            )
        return AllSteps(inputs)
    check_mask(mask, inputs)
    if is_concrete(mask):
        mask = np.asarray(mask)
    if time_major:
        mask = mask.T  # From here on it is (batch, time).
    if capacity is None:
        return MaskedSteps(inputs, mask, lowering)
    _check_capacity(mask, capacity)
    return PackedSteps(inputs, mask, lowering)


_LAYOUT = {False: "(batch, time)", True: "(time, batch)"}


def is_time_major(inputs: Inputs) -> bool:
    """Whether time is axis 0 of all that has a time axis; the mask is then like it."""
    axes = [axis for axis in inputs.mapped_axes if isinstance(axis, int)]
    return axes == [0] * len(axes)


def check_mask(mask: Any, inputs: Inputs) -> None:
    """Refuses a mask that does not have the layout and the sizes of the inputs."""
    require_mask_dtype(mask)
    time_major = is_time_major(inputs)
    layout = _LAYOUT[time_major]
    if mask.ndim != 2:
        raise ValueError(
            f"mask must have shape {layout}, got {describe(mask)}. Give a mask that is "
            "for fun itself as a positional argument."
        )
    timesteps = time_size(inputs)
    for x in inputs.mapped:
        require_values("mask", "no argument with a time axis may be", x)
    for x, axis in zip(inputs.mapped, inputs.mapped_axes):
        if not isinstance(axis, int):
            continue
        batch = mask.shape[time_major] if x.ndim == 1 else batch_size(x, axis)
        shape = (timesteps, batch) if time_major else (batch, timesteps)
        if mask.shape != shape:
            raise ValueError(
                f"mask must have shape {layout} = {shape} to go with an input "
                f"{describe(x)} with time on axis {axis}, got {describe(mask)}."
            )


def _check_capacity(mask, capacity: int) -> None:
    if not is_concrete(mask):
        return
    valid = int(np.sum(mask))
    if valid > capacity:
        raise ValueError(
            f"capacity={capacity} must be at least the number of valid steps, got a "
            f"mask with {valid}."
        )
