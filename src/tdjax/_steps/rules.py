"""What `method="auto"` does where no table has the place: one rule that was measured.

On a CPU, eight blocks in straight-line code take 0.5 to 0.95 of the time of all steps
at once for convolutions over images, in the forward pass and with the gradient: their
activations stay in the caches. Small convolutions gain nothing, and code of many
operations would compile for long. Everything else is `"vmap"`.
"""

import math
from typing import Any

from tdjax._jaxprs import CALLS_AND_CUSTOM_DERIVATIVES, open_program

_BLOCKS = 8
# Multiplications of a block in convolutions, from which blocks were faster.
_LEAST_WORK = 5e6
# Operations of a step, up to which eight copies of them compile fast.
_MOST_OPERATIONS = 200


def block_size(program: Any, timesteps: int) -> int | None:
    """The steps of a block on a CPU, or None for all steps at once.

    `program` is that of all steps at once.
    """
    operations, work = _count(open_program(program)[0])
    if timesteps < 2 or operations > _MOST_OPERATIONS:
        return None
    size = math.ceil(timesteps / _BLOCKS)
    return size if work * size / timesteps > _LEAST_WORK else None


def _count(jaxpr: Any) -> tuple[int, float]:
    """`(operations, multiplications in convolutions over images)`."""
    operations, work = 0, 0.0
    for eqn in jaxpr.eqns:
        name = CALLS_AND_CUSTOM_DERIVATIVES.get(eqn.primitive.name)
        if name in eqn.params:
            more = _count(open_program(eqn.params[name])[0])
            operations, work = operations + more[0], work + more[1]
            continue
        operations += 1
        if eqn.primitive.name == "conv_general_dilated":
            work += _multiplications(eqn)
    return operations, work


def _multiplications(eqn: Any) -> float:
    kernel, y = eqn.invars[1].aval, eqn.outvars[0].aval
    if not all(isinstance(size, int) for size in (*kernel.shape, *y.shape)):
        return 0.0  # Of a symbolic batch, nothing was measured.
    if kernel.ndim < 4 or eqn.params["feature_group_count"] > 1:
        return 0.0
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return float(y.size) * kernel.size / outputs
