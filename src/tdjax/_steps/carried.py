"""State that goes from step to step, at the cost of that state alone.

A loop over all of the layer would be right, but slow: of a layer with running
statistics, only their update depends on the step before. So one step is traced, and its
equations are sorted by what they depend on:

1. *fixed* equations depend on nothing that changes, and run once;
2. *early* equations depend on the step's inputs, and run over all steps at once, by any
   lowering;
3. *late* equations depend on what the step before wrote, and run in a compiled loop,
   which gets the values it needs from the early ones.

Results are early or late likewise, and are put back into their order at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe
from tdjax._jaxprs import evaluate_equations, is_literal, read
from tdjax._steps.axes import (
    PER_STEP,
    Axis,
    Inputs,
    broadcast_axes,
    first_step,
    map_results,
    output_position,
    time_size,
)
from tdjax._steps.lowering import Lowering, check_out_axis
from tdjax._steps.steps import Steps


def distribute_carried(
    call, carried, steps: Steps, out_axes, lowering: Lowering
) -> tuple[Any, Any]:
    """Runs `y, carried = call(carried, mapped)` over all steps, one after the other.

    Returns `(y, carried)`: the results of all steps, and the state after the last one.
    Steps without a valid example leave the state as it is.
    """
    step = _SortedStep(call, carried, steps.inputs) if carried else None
    if step is None or not step.written:
        run = lambda mapped: call(carried, mapped)[0]
        return steps.run(run, out_axes, lowering), carried
    map_results(check_out_axis, step.y, out_axes)
    axes = broadcast_axes("out_axes", out_axes, step.y, "the results")
    early_axes, late_axes = step.early(axes), step.late(axes)
    if any(axis is None for axis in late_axes):
        raise ValueError(
            "out_axes=None is for a result that is the same at every step, got one "
            "that depends on state that goes from step to step."
        )
    early, for_loop = steps.run(step.run_early, (early_axes, PER_STEP), lowering)
    after, late = step.run_late(for_loop, steps.weights, time_size(steps.inputs))
    late = steps.hide([*map(_move_time, late, late_axes)], late_axes)
    return step.join(early, late), step.join_state(after)


def _move_time(y, axis: Axis):
    """From axis 0, where a loop stacks its results."""
    return jnp.moveaxis(y, 0, output_position(axis, y.ndim))


class _SortedStep:
    """The equations of one step: fixed ones evaluated, early and late ones apart."""

    def __init__(self, call, carried, inputs: Inputs):
        one_step = lambda mapped: [*map(first_step, mapped, inputs.mapped_axes)]
        step = jax.eval_shape(one_step, inputs.mapped)
        carried = jax.tree.map(_widen, carried, jax.eval_shape(call, carried, step)[1])
        program, (self.y, _) = jax.make_jaxpr(call, return_shape=True)(carried, step)
        jaxpr = program.jaxpr
        self.carried, self.structure = jax.tree.flatten(carried)
        size = len(self.carried)
        before, self.inputs = jaxpr.invars[:size], jaxpr.invars[size:]
        self.results, after = jaxpr.outvars[:-size], jaxpr.outvars[-size:]
        self.written = [i for i in range(size) if after[i] is not before[i]]
        self.before = [before[i] for i in self.written]
        self.after = [after[i] for i in self.written]
        self.fixed = dict(zip(jaxpr.constvars, program.consts, strict=True))
        self.fixed |= dict(zip(before, self.carried, strict=True))
        self._check_kept()
        self._sort(jaxpr.eqns)

    def _check_kept(self):
        for old, new in zip(self.before, self.after):
            if (old.aval.shape, old.aval.dtype) != (new.aval.shape, new.aval.dtype):
                raise ValueError(
                    "State that goes from step to step must keep its shape and dtype, "
                    f"got {describe(old.aval)} that becomes {describe(new.aval)} in a "
                    "step."
                )

    def _sort(self, eqns):
        """Sorts the equations, and finds the values that the late ones need."""
        early_vars, self.late_vars = set(self.inputs), set(self.before)
        fixed: list[Any] = []
        self.early_eqns, self.late_eqns = [], []
        for eqn in eqns:
            operands = set(_variables(eqn.invars))
            if operands & self.late_vars:
                self.late_eqns.append(eqn)
                self.late_vars.update(eqn.outvars)
            elif operands & early_vars:
                self.early_eqns.append(eqn)
                early_vars.update(eqn.outvars)
            else:
                fixed.append(eqn)
        evaluate_equations(fixed, self.fixed)
        needed = [v for eqn in self.late_eqns for v in eqn.invars] + self.after
        self.for_loop = [
            v for v in dict.fromkeys(_variables(needed)) if v in early_vars
        ]

    def early(self, items) -> list:
        """Of `items`, one for each result: those of the early results."""
        return [x for x, v in zip(items, self.results) if not self._is_late(v)]

    def late(self, items) -> list:
        return [x for x, v in zip(items, self.results) if self._is_late(v)]

    def _is_late(self, atom) -> bool:
        return not is_literal(atom) and atom in self.late_vars

    def run_early(self, mapped):
        """`(results, what the loop needs of this step)`."""
        env = self.fixed | dict(zip(self.inputs, mapped, strict=True))
        evaluate_equations(self.early_eqns, env)
        return read(env, self.early(self.results)), read(env, self.for_loop)

    def run_late(self, for_loop, weights, timesteps):
        """`(state after the last step, results)`, time first."""

        def body(state, step):
            values, weight = step
            env = self.fixed | dict(zip(self.before, state, strict=True))
            env |= dict(zip(self.for_loop, values, strict=True))
            evaluate_equations(self.late_eqns, env)
            after = read(env, self.after)
            if weight is not None:
                after = [jnp.where(weight, new, old) for new, old in zip(after, state)]
            return after, read(env, self.late(self.results))

        state = [self.carried[i] for i in self.written]
        weights = None if weights is None else jnp.asarray(weights)
        return jax.lax.scan(body, state, (for_loop, weights), timesteps)

    def join(self, early, late):
        """The results, in their order."""
        parts = iter(early), iter(late)
        leaves = [next(parts[self._is_late(atom)]) for atom in self.results]
        return jax.tree.unflatten(jax.tree.structure(self.y), leaves)

    def join_state(self, after):
        """All of the state, with what the steps wrote."""
        leaves = dict(enumerate(self.carried)) | dict(zip(self.written, after))
        return jax.tree.unflatten(self.structure, [*leaves.values()])


def _widen(before, after):
    """`before` with the dtype of `after`, where a step computes wider floats from it.

    A loop over steps would do so too: with x64, Flax's float32 statistics of float64
    inputs are float64 after the first step.
    """
    are_floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in (before, after)]
    if all(are_floats) and jnp.finfo(after.dtype).bits > jnp.finfo(before.dtype).bits:
        return before.astype(after.dtype)
    return before


def _variables(atoms) -> list:
    return [atom for atom in atoms if not is_literal(atom)]
