"""The rule for TimeDistributed, Keras' own and the drop-in."""

from typing import Any

import keras

from tdjax._keras_graph import parameters
from tdjax._keras_independent import treats_examples_alone
from tdjax._keras_registry import convert_layer, inside, register_rule, takes_mask
from tdjax._keras_rules import Converted
from tdjax._keras_time import TimeDistributed

# What tdjax.keras.TimeDistributed has beyond Keras' own.
OPTIONS = ("chunk_size", "unroll", "remat", "share_rng")


@register_rule(keras.layers.TimeDistributed)
def convert_time_distributed(layer: Any) -> Converted:
    with inside(f"inside '{layer.name}'"):
        inner, variables = convert_layer(layer.layer)
    options = {name: getattr(layer, name) for name in OPTIONS if hasattr(layer, name)}
    method = _method(layer, options.get("share_rng", False))
    module = TimeDistributed(
        inner,
        hands_mask=takes_mask(layer.layer) and "mask" in parameters(type(inner)),
        method=method,
        # Keras' loop over steps starts each with the statistics that the last one left.
        variable_carry="batch_stats" if method == "vmap" else False,
        **options,
    )
    return module, variables


def _method(layer: Any, share_rng: bool) -> str:
    """The layer's own, or the faster one where the two are equal."""
    if getattr(layer, "method", None) is not None:
        return layer.method
    alone = treats_examples_alone(layer.layer) and not share_rng
    return "fold" if alone else "vmap"
