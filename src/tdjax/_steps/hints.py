"""Notes on the errors of a call: what was probably meant, and how to write it.

`fun` and JAX raise errors in their own terms. `add_hints` adds what they can't know:
which arguments were mapped over time and which were shared, and why a Flax module
inside `fun` needs an adapter. Hints of tdjax's own errors stand where they are raised.
"""

import contextlib

from tdjax._checks import describe, is_array, leaves_by_path
from tdjax._steps.axes import Inputs, batch_size, step_shape
from tdjax._steps.lowering import Lowering

_ONE_STEP = "One step of the input"


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
    error.add_note(
        f"{_one_step(args, inputs)} Give None in in_axes to what every step shares, "
        "such as parameters."
    )
    names = [f"args{path}" for path in leaves_by_path(args)]
    shared = [(name, x) for name, x, axis in zip(names, *inputs[:2]) if axis is None]
    shared += [(f"kwargs{path}", x) for path, x in leaves_by_path(kwargs).items()]
    if lowering.capacity is not None:
        _add_note_of_batch(error, f"capacity={lowering.capacity}", shared, inputs)
    elif lowering.method == "fold":
        _add_note_of_batch(error, "method='fold'", shared, inputs)


@contextlib.contextmanager
def explained(args: tuple):
    """Adds what one step was to the errors of a layer's call on it."""
    try:
        yield
    except Exception as error:
        # The last is the only one of Flax's errors that a wrong time axis causes.
        kinds = ("TypeError", "ValueError", "ScopeParamShapeError")
        notes = "".join(getattr(error, "__notes__", ()))
        if type(error).__name__ in kinds and _ONE_STEP not in notes:
            error.add_note(
                f"{_ONE_STEP} was {', '.join(map(describe, args))}. If the input has "
                "no time axis, call the layer without TimeDistributed; if time is on "
                "another axis, say so in in_axes."
            )
        raise


def _one_step(args: tuple, inputs: Inputs) -> str:
    """What was taken as one step; it shows a wrong time axis."""
    steps = [
        f"args{path} {describe(step_shape(x, axis))} (axis {axis} of {describe(x)} is "
        "time)"
        for path, x, axis in zip(leaves_by_path(args), *inputs[:2])
        if isinstance(axis, int)
    ]
    return f"One step is {', '.join(steps[:4])}{', ...' if steps[4:] else ''}."


def _add_note_of_batch(error, option: str, shared: list, inputs: Inputs) -> None:
    """Names the shared arrays that seem to have a batch axis."""
    batches = [
        batch_size(x, axis)
        for x, axis in zip(inputs.mapped, inputs.mapped_axes)
        if isinstance(axis, int) and x.ndim > 1
    ]
    names = [
        f"{name} {describe(x)}"
        for name, x in shared
        if is_array(x) and x.shape[:1] in [(batch,) for batch in batches]
    ]
    if names:
        error.add_note(
            f"With {option}, the rows that fun gets are steps of all examples, but "
            f"{', '.join(names)} is shared by all steps as it is and seems to have a "
            "batch axis. Repeat it over time (jnp.broadcast_to) and pass it as a "
            "positional argument that in_axes maps."
        )
