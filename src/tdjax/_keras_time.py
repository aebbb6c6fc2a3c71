"""`TimeDistributed` with Keras' treatment of masks. Nothing here knows Keras."""

import jax.numpy as jnp

from tdjax import linen
from tdjax._keras_graph import parameters


class TimeDistributed(linen.TimeDistributed):
    """`tdjax.linen.TimeDistributed` that treats masks as Keras does.

    The layer gets each step's slice of the mask, and masked steps are not zeroed. The
    mask passes on; one over parts of steps (words in lines) becomes one over steps if
    the layer ends it.

    Attributes:
      hands_mask: whether the layer gets its slice of the mask.
      ends_mask: whether the layer's own output has no mask.
    """

    hands_mask: bool = False
    ends_mask: bool = False

    def __call__(self, inputs, mask=None, train: bool = False):
        accepted = parameters(type(self.layer))
        kwargs = {"train": train} if "train" in accepted else {}
        args = [inputs]
        if self.hands_mask and mask is not None:
            # Only positional arguments are cut into steps.
            args += [None] * (accepted.index("mask") - 1) + [mask]
        return super().__call__(*args, **kwargs)

    def compute_mask(self, inputs, mask):
        if mask is None or mask.ndim == 2 or not self.ends_mask:
            return mask
        return jnp.any(mask, axis=tuple(range(2, mask.ndim)))
