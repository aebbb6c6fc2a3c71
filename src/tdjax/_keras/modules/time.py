"""`TimeDistributed` with Keras' treatment of masks."""

import jax
import jax.numpy as jnp

from tdjax import linen
from tdjax._keras.modules.graph import parameters


class TimeDistributed(linen.TimeDistributed):
    """`tdjax.linen.TimeDistributed` that treats masks as Keras does.

    The layer gets its step's slice of the mask, and masked steps are not zeroed. The
    mask is passed on, reduced by `any` over axes that the output does not have: where
    lines of words become vectors, a line is valid if a word is.
    """

    hands_mask: bool = False  # Whether the layer gets its slice of the mask.

    def __call__(self, inputs, mask=None, train: bool = False, return_mask=False):
        accepted = parameters(type(self.layer))
        kwargs = {"train": train} if "train" in accepted else {}
        args = [inputs]
        if self.hands_mask and jax.tree.leaves(mask):
            # Only positional arguments are cut into steps.
            args += [None] * (accepted.index("mask") - 1) + [mask]
        outputs = super().__call__(*args, **kwargs)
        return (outputs, _mask_for(outputs, mask)) if return_mask else outputs


def _mask_for(outputs, mask):
    if not jax.tree.leaves(mask):
        return None
    mask = jax.tree.leaves(mask)[0]
    return jnp.any(mask, axis=ended_axes(mask.shape, jax.tree.leaves(outputs)[0].shape))


def ended_axes(mask_shape: tuple, output_shape: tuple) -> tuple[int, ...]:
    """The axes of a mask after (batch, time) that an output does not have."""
    kept = 2
    room = min(len(mask_shape), len(output_shape) - 1)
    while kept < room and mask_shape[kept] == output_shape[kept]:
        kept += 1
    return tuple(range(kept, len(mask_shape)))
