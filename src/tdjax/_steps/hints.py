"""Notes on the errors of a call: what was probably meant, and how to write it.

`fun` and JAX raise errors in their own terms. `add_hints` adds what they can't know:
which arguments were mapped over time and which were shared, and why a Flax module
inside `fun` needs an adapter.
"""

import numpy as np

from tdjax._checks import describe, is_array, leaves_by_path
from tdjax._steps.axes import Inputs, batch_size
from tdjax._steps.lowering import Lowering


def add_hints(
    error: Exception, fun, args: tuple, kwargs: dict, inputs: Inputs, lowering: Lowering
) -> None:
    """Adds notes to an error that was raised while `fun` ran over all steps."""
    # Known by its name: Flax is not imported here.
    if type(error).__name__ == "TraceContextError":
        error.add_note(
            "It seems that fun closes over a Flax module. Wrap the module instead: use "
            "tdjax.nnx.TimeDistributed, which keeps what it writes and gives each step "
            "its own noise."
        )
    if not isinstance(error, TypeError | ValueError):
        return
    if isinstance(fun, type):
        error.add_note(
            f"fun is the class {fun.__name__}: calling it makes an instance. Pass an "
            "instance or a function."
        )
    names = [f"args{path}" for path in leaves_by_path(args)]
    error.add_note(_note_of_steps(names, inputs))
    if lowering.method == "fold" or lowering.capacity is not None:
        shared = [
            *zip(names, inputs.leaves, inputs.axes),
            *((f"kwargs{path}", x, None) for path, x in leaves_by_path(kwargs).items()),
        ]
        _add_note_of_batches(error, shared, inputs, lowering)


def _note_of_steps(names: list[str], inputs: Inputs) -> str:
    """What one step is; it shows where an axis of parameters was taken as time."""
    steps = []
    for name, x, axis in zip(names, inputs.leaves, inputs.axes):
        if isinstance(axis, int):
            step = f"{x.dtype}[{','.join(map(str, np.delete(x.shape, axis)))}]"
            steps.append(f"{name} {step} (axis {axis} of {describe(x)} is time)")
    return (
        f"One step is {', '.join(steps[:4])}{', ...' if steps[4:] else ''}. Give None "
        "in in_axes to what every step shares, such as parameters."
    )


def _add_note_of_batches(error, arrays, inputs: Inputs, lowering: Lowering) -> None:
    """Names shared arrays that seem to have a batch axis, which steps are part of."""
    batches = [
        batch_size(x, axis)
        for x, axis in zip(inputs.mapped, inputs.mapped_axes)
        if isinstance(axis, int) and x.ndim > 1
    ]
    names = [
        f"{name} {describe(x)}"
        for name, x, axis in arrays
        if axis is None and is_array(x) and x.shape[:1] == tuple(batches[:1])
    ]
    if not names:
        return
    if lowering.capacity is not None:
        option, batch = (
            f"capacity={lowering.capacity}",
            "the valid steps of all examples",
        )
    else:
        option, batch = "method='fold'", "all steps of all examples"
    error.add_note(
        f"With {option} the batch that fun sees is {batch}. {', '.join(names)} is "
        "shared by all steps and seems to have a batch axis of its own. Repeat it over "
        "time (jnp.broadcast_to) and pass it as a positional argument that in_axes "
        "maps."
    )
