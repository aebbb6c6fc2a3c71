"""The rule for TimeDistributed, and what its layer does to a mask."""

from typing import Any

import jax
import keras

from tdjax._keras_graph import parameters
from tdjax._keras_models import Functional, calls_in_order
from tdjax._keras_registry import convert_layer, inside, register_rule, takes_mask
from tdjax._keras_rules import Converted
from tdjax._keras_time import TimeDistributed

# What tdjax.keras.TimeDistributed has beyond Keras' own.
OPTIONS = ("method", "chunk_size", "unroll", "remat", "share_rng")


@register_rule(keras.layers.TimeDistributed)
def convert_time_distributed(layer: keras.layers.TimeDistributed) -> Converted:
    with inside(f"inside '{layer.name}'"):
        inner, variables = convert_layer(layer.layer)
    options = {name: getattr(layer, name) for name in OPTIONS if hasattr(layer, name)}
    # Keras' loop over steps starts each with the statistics that the last one left.
    has_steps = options.get("method", "vmap") == "vmap"
    module = TimeDistributed(
        inner,
        hands_mask=takes_mask(layer.layer) and "mask" in parameters(type(inner)),
        ends_mask=not _keeps_mask(layer.layer),
        variable_carry="batch_stats" if has_steps else False,
        **options,
    )
    return module, variables


def _keeps_mask(layer: Any, inputs: Any = None) -> bool:
    """Whether the output of a layer has a mask if its input has one."""
    if isinstance(layer, keras.Sequential):
        layer = layer._functional
    if isinstance(layer, Functional):
        return _graph_keeps_mask(layer)
    if not layer.supports_masking:
        return False
    inputs = keras.KerasTensor((None, None, None)) if inputs is None else inputs
    masks = jax.tree.map(lambda x: keras.KerasTensor(x.shape[:-1], "bool"), inputs)
    return bool(jax.tree.leaves(layer.compute_mask(inputs, masks)))


def _graph_keeps_mask(functional: Any) -> bool:
    masked = set(map(id, functional.inputs))
    for call in calls_in_order(functional):
        is_layer = isinstance(call.operation, keras.layers.Layer)
        has_mask = any(id(x) in masked for x in jax.tree.leaves(call.args[:1]))
        if is_layer and has_mask and _keeps_mask(call.operation, call.args[0]):
            masked.update(map(id, call.outputs))
    return any(id(x) in masked for x in functional.outputs)
