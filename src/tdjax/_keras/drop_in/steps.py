"""One Keras layer over all steps.

A call of a Keras layer writes to its variables, seeds and losses. Here a step is a pure
function of their values, in a `keras.StatelessScope`, so that the core can lower it.
"""

from typing import Any

import jax.numpy as jnp
import keras
from keras.src import backend

from tdjax._steps.axes import PER_STEP, flatten_inputs, time_size
from tdjax._steps.carried import distribute_carried
from tdjax._steps.lowering import Lowering
from tdjax._steps.stateful import first_steps
from tdjax._steps.steps import AllSteps

# Since 3.14 Keras divides what an activity regularizer adds by the batch size.
_BY_EXAMPLE = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 14)


def distribute_layer(
    layer, inputs, mask, training, lowering: Lowering, share_rng: bool
) -> tuple[Any, list]:
    """Runs `layer.call` on every step: `(outputs, losses)`.

    Variables are assigned; each step starts with what the step before wrote to them.
    """
    step = _StatelessLayer(layer, training)
    values, seeds = step.read()
    args = (inputs, mask)
    by_step, axis, seeds_after = _count_seeds(step, values, seeds, args, share_rng)
    steps = AllSteps(flatten_inputs((by_step, *args), (axis, 1, 1)))
    run = _run_folded if lowering.method == "fold" else _run_in_order
    (y, losses), after = run(step, values, steps, lowering)
    step.assign([*values, *seeds], [*after, *seeds_after])
    return y, [jnp.sum(loss, axis=0) for loss in losses]


def _count_seeds(step, values, seeds, args, share_rng: bool):
    """`(seeds of the steps, their time axis, seeds after all steps)`.

    A seed counts the draws, and every step draws equally often, so each step's seed
    can be computed and the noise is that of Keras' loop.
    """
    if not seeds:
        return seeds, None, seeds
    _, (_, moved) = step(values, seeds, *first_steps(args, 1))
    if share_rng or all(new is old for new, old in zip(moved, seeds)):
        return seeds, None, moved
    timesteps = time_size(flatten_inputs(args, 1))
    counts = jnp.arange(timesteps, dtype=seeds[0].dtype)[:, None]
    moves = [new - old for new, old in zip(moved, seeds)]
    by_step = [seed + counts * move for seed, move in zip(seeds, moves)]
    drawn = [
        jnp.asarray(timesteps, seed.dtype) * move for seed, move in zip(seeds, moves)
    ]
    return by_step, PER_STEP, [seed + n for seed, n in zip(seeds, drawn)]


def _run_in_order(step, values, steps: AllSteps, lowering: Lowering):
    def call(values, mapped):
        results, (after, _) = step(values, *steps.inputs.rebuild(mapped))
        return results, after

    return distribute_carried(call, values, steps, (1, PER_STEP), lowering)


def _run_folded(step, values, steps: AllSteps, lowering: Lowering):
    """One call for all steps of a block, which writes to the variables once."""
    timesteps, chunk = time_size(steps.inputs), lowering.chunk_size
    # A symbolic size can't be compared.
    in_one = isinstance(timesteps, int) and timesteps <= (chunk or timesteps)

    def call(mapped):
        (y, losses), (after, _) = step(values, *steps.inputs.rebuild(mapped))
        changed = {
            i: new for i, (old, new) in enumerate(zip(values, after)) if new is not old
        }
        step.require_no_losses(losses)
        if chunk is not None and not in_one:
            step.require_no_writes(changed, chunk)
        return y, changed

    y, changed = steps.run(call, (1, PER_STEP), lowering)
    if timesteps == 0:
        changed = {}
    after = [changed[i][0] if i in changed else old for i, old in enumerate(values)]
    return (y, []), after


class _StatelessLayer:
    """A layer whose call is a function of the values of its variables."""

    def __init__(self, layer, training):
        self.layer, self.training = layer, training
        self.layers = layer._flatten_layers()
        seeds = {id(g.state) for part in self.layers for g in part._seed_generators}
        listed = [*layer.variables, *layer.metrics_variables]
        variables = {id(variable): variable for variable in listed}
        self.seeds = [v for key, v in variables.items() if key in seeds]
        self.variables = [v for key, v in variables.items() if key not in seeds]

    def read(self) -> tuple[list, list]:
        """`(variables, seeds)`, in the dtypes that they are kept in."""
        with backend.AutocastScope(None):
            value = lambda variable: jnp.asarray(variable.value)
            return [*map(value, self.variables)], [*map(value, self.seeds)]

    def assign(self, before: list, after: list) -> None:
        for variable, old, new in zip([*self.variables, *self.seeds], before, after):
            if new is not old:
                variable.assign(new)

    def __call__(self, values, seeds, inputs, mask):
        """`((y, losses), (values, seeds))` of one step."""
        keys = [id(v) for v in [*self.variables, *self.seeds]]
        outer = backend.get_stateless_scope()
        # The layer may also read variables of the surrounding scope.
        start = {} if outer is None else dict(outer.state_mapping)
        start |= dict(zip(keys, [*values, *seeds], strict=True))
        scope = keras.StatelessScope(collect_losses=True, initialize_variables=False)
        with scope:
            scope.state_mapping = dict(start)
            known = [(part, {*part._loss_ids}) for part in self.layers]
            y = self._call_layer(inputs, mask)
            losses = list(scope.losses)
            # Keras knows losses by `id`, which a later loss may have too.
            for part, ids in known:
                part._loss_ids = ids
        self._require_own_writes(start, scope.state_mapping, keys)
        after = [scope.state_mapping[key] for key in keys]
        return (y, losses), (after[: len(values)], after[len(values) :])

    def _call_layer(self, inputs, mask):
        layer, kwargs = self.layer, {}
        if layer._call_has_mask_arg and mask is not None:
            kwargs["mask"] = mask
        if layer._call_has_training_arg:
            kwargs["training"] = self.training
        y = layer.call(inputs, **kwargs)
        if layer.activity_regularizer is not None:
            for output in keras.tree.flatten(y):
                examples = max(output.shape[0], 1) if _BY_EXAMPLE else 1
                layer.add_loss(layer.activity_regularizer(output) / examples)
        return y

    def _require_own_writes(self, start, end, keys) -> None:
        strange = [key for key in end if end[key] is not start.get(key)]
        if set(strange) - set(keys):
            raise ValueError(
                f"layer {self.layer.name!r} must write to its own variables only, got "
                "a call that assigns to one that is not in layer.variables. Make it an "
                "attribute of the layer."
            )

    def require_no_losses(self, losses) -> None:
        if losses:
            raise ValueError(
                f"method='fold' calls layer {self.layer.name!r} once for all steps, "
                "so the losses that it adds would differ. Use method='vmap'."
            )

    def require_no_writes(self, changed, chunk) -> None:
        if changed:
            paths = [self.variables[i].path for i in changed]
            raise ValueError(
                f"method='fold' with chunk_size={chunk} needs a layer that writes to "
                f"no variable, got one that writes to {paths}. Use method='vmap', or "
                "chunk_size=None."
            )
