"""Which steps are computed: all of them, all but hidden where masked, or packed."""

from typing import Any

import numpy as np

from tdjax._checks import describe, is_concrete
from tdjax._masks import require_mask_dtype
from tdjax._steps.axes import Inputs, batch_size, time_size
from tdjax._steps.lowering import Lowering
from tdjax._steps.masked import MaskedSteps
from tdjax._steps.packed import PackedSteps
from tdjax._steps.steps import AllSteps, Steps


def select_steps(inputs: Inputs, mask, lowering: Lowering) -> Steps:
    """The steps to compute, after checking that the mask fits them."""
    capacity = lowering.capacity
    if mask is None:
        if capacity is not None:
            raise ValueError(
                f"capacity={capacity} needs a mask that says which steps are valid: "
                "call with mask=, bool, (batch, time)."
            )
        return AllSteps(inputs)
    _check_mask(mask, inputs)
    if is_concrete(mask):
        mask = np.asarray(mask)
    if capacity is None:
        return MaskedSteps(inputs, mask)
    _check_capacity(mask, capacity)
    return PackedSteps(inputs, mask, capacity)


def _check_mask(mask: Any, inputs: Inputs) -> None:
    require_mask_dtype(mask)
    if mask.ndim != 2:
        raise ValueError(
            f"mask must have shape (batch, time), got {describe(mask)}. Give a mask "
            "that is for fun itself as a positional argument."
        )
    timesteps = time_size(inputs)
    for x, axis in zip(inputs.mapped, inputs.mapped_axes):
        if not isinstance(axis, int):
            continue
        batch = mask.shape[0] if x.ndim == 1 else batch_size(x, axis)
        if mask.shape != (batch, timesteps):
            raise ValueError(
                f"mask must have shape (batch, time) = {(batch, timesteps)} to go "
                f"with an input {describe(x)} with time on axis {axis}, got "
                f"{describe(mask)}."
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
