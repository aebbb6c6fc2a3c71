"""Which steps are computed, and how their results go back: the common interface."""

import copy
from typing import Any, Protocol, runtime_checkable

from tdjax._steps.axes import Inputs
from tdjax._steps.lowering import Lowering, distribute


@runtime_checkable
class Steps(Protocol):
    """What `AllSteps`, `MaskedSteps` and `PackedSteps` offer.

    `inputs` are those of the computed steps. `weights` says which of these steps count
    in the state of a layer, bool, `(steps,)`; None means that all do.
    """

    inputs: Inputs
    weights: Any

    def run(self, call, out_axes, lowering: Lowering) -> Any:
        """The results of `call`, a function of one step's leaves, for the caller."""

    def hide(self, results, out_axes) -> Any:
        """Results of the computed steps as the caller sees them: zeros where masked."""

    def hide_sown(self, sown) -> Any:
        """Zeros where masked, in values that a layer has sown: time first."""

    def with_inputs(self, inputs: Inputs) -> "Steps":
        """The same steps, with other inputs."""
        steps = copy.copy(self)
        steps.inputs = inputs
        return steps


class AllSteps(Steps):
    """Without a mask: every step is computed, and every result is kept."""

    weights = None

    def __init__(self, inputs: Inputs):
        self.inputs = inputs

    def run(self, call, out_axes, lowering: Lowering):
        return distribute(call, self.inputs, out_axes, lowering)

    def hide(self, results, out_axes):
        return results

    def hide_sown(self, sown):
        return sown
