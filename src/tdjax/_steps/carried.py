"""State that goes from step to step, for the price of that state alone.

A loop over steps would be right, and slow: of a layer with running statistics, only
their update depends on the step before. So one step is traced, and its equations are
sorted by what they depend on: on nothing that changes, on the step's inputs, or on what
the step before has written. The first run once, the second over all steps at once by
any lowering, and the last in a compiled loop.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tdjax._checks import describe
from tdjax._jaxprs import evaluate_equations, is_literal, read
from tdjax._steps.axes import (
    PER_STEP,
    broadcast_axes,
    first_step,
    output_position,
    time_size,
)
from tdjax._steps.lowering import Lowering, check_out_axis


def distribute_carried(call, carried, steps, out_axes, lowering: Lowering):
    """Runs `y, carried = call(carried, mapped)` over all steps, one after the other.

    Returns `(y, carried)`: the results of all steps, and the state after the last one.
    Steps without a valid example leave the state as it is.
    """
    program = _Step(call, carried, steps.inputs) if carried else None
    if program is None or not program.written:
        run = lambda mapped: call(carried, mapped)[0]
        return steps.run(run, out_axes, lowering), carried
    axes = broadcast_axes("out_axes", out_axes, program.y, "the results")
    jax.tree.map(check_out_axis, jax.tree.leaves(program.y), axes)
    early_axes, late_axes = program.early(axes), program.late(axes)
    if any(axis is None for axis in late_axes):
        raise ValueError(
            "out_axes=None is for a result that is the same at every step, got one "
            "that depends on state that goes from step to step."
        )
    early, handed_on = steps.run(program.run_early, (early_axes, PER_STEP), lowering)
    timesteps = time_size(steps.inputs)
    after, late = program.run_late(handed_on, steps.weights, timesteps)
    late = steps.hide([*map(_move_time, late, late_axes)], late_axes)
    return program.join(early, late), program.join_state(after)


def _move_time(y, axis):
    return jnp.moveaxis(y, 0, output_position(axis, y.ndim))


class _Step:
    """The equations of one step, sorted."""

    def __init__(self, call, carried, inputs):
        one_step = lambda mapped: [*map(first_step, mapped, inputs.mapped_axes)]
        step = jax.eval_shape(one_step, inputs.mapped)
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
                    f"got {describe(old.aval)} that a step makes {describe(new.aval)}."
                )

    def _sort(self, eqns):
        by_step, self.late_vars = set(self.inputs), set(self.before)
        fixed: list[Any] = []
        self.early_eqns, self.late_eqns = [], []
        for eqn in eqns:
            uses = set(_variables(eqn.invars))
            kind = fixed
            if uses & self.late_vars:
                kind = self.late_eqns
                self.late_vars.update(eqn.outvars)
            elif uses & by_step:
                kind = self.early_eqns
                by_step.update(eqn.outvars)
            kind.append(eqn)
        evaluate_equations(fixed, self.fixed)
        wanted = [v for eqn in self.late_eqns for v in eqn.invars] + self.after
        self.handed_on = [v for v in dict.fromkeys(_variables(wanted)) if v in by_step]

    def early(self, per_result) -> list:
        """Of something for each result, that of those that need no step before."""
        return [x for x, v in zip(per_result, self.results) if not self._is_late(v)]

    def late(self, per_result) -> list:
        return [x for x, v in zip(per_result, self.results) if self._is_late(v)]

    def _is_late(self, atom) -> bool:
        return not is_literal(atom) and atom in self.late_vars

    def run_early(self, mapped):
        """`(results, what the loop needs of this step)`."""
        env = self.fixed | dict(zip(self.inputs, mapped, strict=True))
        evaluate_equations(self.early_eqns, env)
        return read(env, self.early(self.results)), read(env, self.handed_on)

    def run_late(self, handed_on, weights, timesteps):
        """`(state after the last step, results)`, time first."""

        def body(state, step):
            values, weight = step
            env = self.fixed | dict(zip(self.before, state, strict=True))
            env |= dict(zip(self.handed_on, values, strict=True))
            evaluate_equations(self.late_eqns, env)
            after = read(env, self.after)
            if weight is not None:
                after = [jnp.where(weight, new, old) for new, old in zip(after, state)]
            return after, read(env, self.late(self.results))

        state = [self.carried[i] for i in self.written]
        weights = None if weights is None else jnp.asarray(weights)
        return jax.lax.scan(body, state, (handed_on, weights), timesteps)

    def join(self, early, late):
        """The results, in their order."""
        parts = iter(early), iter(late)
        leaves = [next(parts[self._is_late(atom)]) for atom in self.results]
        return jax.tree.unflatten(jax.tree.structure(self.y), leaves)

    def join_state(self, after):
        leaves = dict(enumerate(self.carried)) | dict(zip(self.written, after))
        return jax.tree.unflatten(self.structure, [*leaves.values()])


def _variables(atoms) -> list:
    return [atom for atom in atoms if not is_literal(atom)]
