"""`tdjax.nnx.CrossEntropyHead`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from tdjax._checks import describe, require_array, require_sizes
from tdjax._cross_entropy.module import (
    check_fields,
    log_probs_of,
    logits_or_loss,
    promoted,
)
from tdjax._dense import Initializer, default_bias_init, default_kernel_init


class CrossEntropyHead(nnx.Module):
    """The softmax head of a model: gives logits, or with labels the loss.

    The parameters are those of `nnx.Linear(in_features, vocabulary)`, with the same
    names, shapes and initial values. With an `nnx.Embed` as vocabulary, the head is
    tied: it shares the embedding as its kernel, and only a bias would be its own.

    Args:
      in_features: the features of `hidden`.
      vocabulary: the number of words, or the `nnx.Embed` of the model.
      logits_soft_cap: as in `tdjax.linear_cross_entropy`.
      use_bias: by default with a number of words, and not with an `nnx.Embed`.
      dtype: that of the computation, as in `nnx.Linear`; by default that of the
        `nnx.Embed`, if there is one.
      param_dtype, kernel_init, bias_init, rngs: as in `nnx.Linear`; `rngs` may be left
        out if the head has no parameters of its own.

    Raises:
      TypeError: if an argument is of another kind.
      ValueError: if a number is not positive, or a size not that of the embedding.

    Example:
      >>> import jax.numpy as jnp, tdjax
      >>> from flax import nnx
      >>> embed = nnx.Embed(1000, 8, rngs=nnx.Rngs(0))
      >>> head = tdjax.nnx.CrossEntropyHead(8, embed)
      >>> hidden, labels = jnp.ones((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> head(hidden).shape, head(hidden, labels, z_loss=1e-4).shape
      ((2, 5, 1000), ())
    """

    def __init__(
        self,
        in_features: int,
        vocabulary: int | nnx.Embed,
        *,
        logits_soft_cap: float | None = None,
        use_bias: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs | None = None,
    ):
        (in_features,) = require_sizes(in_features=in_features)
        self.in_features = in_features
        self.logits_soft_cap = logits_soft_cap
        fields = vocabulary, logits_soft_cap
        check_fields(*fields, nnx.Embed, nnx.Module, dtypes.promote_dtype)
        is_tied = isinstance(vocabulary, nnx.Embed)
        self.dtype = dtype
        if isinstance(vocabulary, nnx.Embed):
            if vocabulary.features != in_features:
                raise ValueError(
                    f"in_features must be {vocabulary.features}, the features of the "
                    f"nnx.Embed, got {in_features}."
                )
            words = vocabulary.num_embeddings
            self.embed = vocabulary
            self.dtype = vocabulary.dtype if dtype is None else dtype
        else:
            words = int(vocabulary)
            key = _require_rngs(rngs).params()
            kernel = kernel_init(key, (in_features, words), param_dtype)
            self.kernel = nnx.Param(kernel)
        if use_bias is None:
            use_bias = not is_tied
        bias = None
        if use_bias:
            key = _require_rngs(rngs).params()
            bias = nnx.Param(bias_init(key, (words,), param_dtype))
        self.bias = nnx.data(bias)

    def __call__(self, hidden, labels=None, **options):
        """Logits, `(..., words)`; with labels what `tdjax.linear_cross_entropy` gives.

        Args:
          hidden: `(..., features)`.
          labels: `(...)`, or None.
          **options: those of `tdjax.linear_cross_entropy`, such as `mask`; without
            labels None or left out.
        """
        params, hidden = self._promoted(hidden)
        return logits_or_loss(self, params, hidden, labels, options)

    def log_probs(self, hidden, labels, **options):
        """`(log_probs, entropies)`, as `tdjax.linear_log_probs` gives them."""
        params, hidden = self._promoted(hidden)
        return log_probs_of(self, params, hidden, labels, options)

    def _promoted(self, hidden):
        require_array("hidden", hidden, 1, "(..., features)")
        if hasattr(self, "embed"):
            params = {"embedding": self.embed.embedding[...]}
        else:
            params = {"kernel": self.kernel[...]}
        if self.bias is not None:
            params["bias"] = self.bias[...]
        return promoted(params, hidden, self.dtype)


def _require_rngs(rngs: nnx.Rngs | None) -> nnx.Rngs:
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"rngs must be an nnx.Rngs, got {describe(rngs)}: this head has parameters "
            "of its own. Pass rngs=nnx.Rngs(seed)."
        )
    return rngs
