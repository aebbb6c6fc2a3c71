"""The rule for TimeDistributed, Keras' own and the drop-in."""

from typing import Any

import keras

from tdjax._keras.drop_in.independent import equal_method
from tdjax._keras.modules.graph import parameters
from tdjax._keras.modules.time import TimeDistributed
from tdjax._keras.registry import convert_layer, inside, register_rule, takes_mask
from tdjax._keras.rules.layers import Converted

# What tdjax.keras.TimeDistributed has beyond Keras' own.
OPTIONS = ("method", "chunk_size", "unroll", "remat", "share_rng")


@register_rule(keras.layers.TimeDistributed)
def convert_time_distributed(layer: Any) -> Converted:
    with inside(f"inside '{layer.name}'"):
        inner, variables = convert_layer(layer.layer)
    # Keras calls the layer under the wrapper's policy, whatever its own is.
    if hasattr(inner, "dtype") and layer.layer.compute_dtype != layer.compute_dtype:
        inner = inner.clone(dtype=layer.compute_dtype)
    options = {name: getattr(layer, name) for name in OPTIONS if hasattr(layer, name)}
    if options.get("method") is None:
        share_rng = options.get("share_rng", False)
        options["method"] = equal_method(layer.layer, share_rng=share_rng)
    # Keras' loop over steps starts each with the statistics that the last one left.
    has_steps = options["method"] == "vmap"
    module = TimeDistributed(
        inner,
        hands_mask=takes_mask(layer.layer) and "mask" in parameters(type(inner)),
        variable_carry="batch_stats" if has_steps else False,
        **options,
    )
    return module, variables
