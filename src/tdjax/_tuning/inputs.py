"""What can be compiled, run and timed: arrays with values, and steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tdjax._checks import describe, is_array, leaves_by_path
from tdjax._steps.axes import flatten_inputs, time_size
from tdjax._steps.places import Place, Program


def check_measurable(place: Place, program: Program) -> int:
    """The number of steps of a call that can be compiled, run and timed."""
    if jax.config.jax_disable_jit:  # pyright: ignore
        raise ValueError(
            "autotune measures compiled programs, and jax_disable_jit is on. Switch it "
            "off: with jax.disable_jit(False)."
        )
    require_arrays("variables", program.variables)
    require_arrays("args", place.args)
    if not place.args:
        raise ValueError(
            "args must hold the inputs of a call, got none. Give them behind what is "
            "tuned: autotune(fun, x), autotune(module, variables, x) of Linen."
        )
    timesteps = time_size(flatten_inputs(place.args, place.in_axes))
    if timesteps < 1:
        raise ValueError("args must have steps to measure, got 0 steps.")
    return timesteps


def require_arrays(name: str, tree: Any) -> None:
    """Refuses what can't be an argument of a compiled function."""
    for path, x in leaves_by_path(tree).items():
        if isinstance(x, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"autotune runs the function, so {name} must hold arrays, got "
                f"{describe(x)}, which has no values. Call it outside of jit; of a "
                "shape alone, give jnp.zeros(x.shape, x.dtype)."
            )
        dtype = x.dtype if is_array(x) else np.result_type(type(x))
        kinds = np.bool_, np.number, jax.dtypes.extended
        if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise TypeError(
                f"{name} must hold arrays and numbers, which autotune compiles a "
                f"program for, got {describe(x)} at {name}{path}. Leave it out: fun "
                "can close over it, and a module can hold it."
            )
