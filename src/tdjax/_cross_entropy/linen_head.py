"""`tdjax.linen.CrossEntropyHead`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tdjax._checks import require_array
from tdjax._cross_entropy.module import (
    check_fields,
    log_probs_of,
    logits_or_loss,
    promoted,
)
from tdjax._dense import Initializer, default_bias_init, default_kernel_init


class CrossEntropyHead(nn.Module):
    """The softmax head of a model: gives logits, or with labels the loss.

    The parameters are those of `nn.Dense(vocabulary)`, with the same names, shapes and
    initial values, so checkpoints fit both. With an `nn.Embed` as vocabulary, the head
    is tied: its kernel is the embedding, and only a bias would be its own.

    Attributes:
      vocabulary: the number of words, or the `nn.Embed` of the model.
      logits_soft_cap: as in `tdjax.linear_cross_entropy`.
      use_bias: by default with a number of words, and not with an `nn.Embed`.
      dtype: that of the computation, as in `nn.Dense`; by default that of the
        `nn.Embed`, if there is one.
      param_dtype, kernel_init, bias_init: as in `nn.Dense`.

    Raises:
      TypeError: if a field is of another kind.
      ValueError: if `vocabulary` or `logits_soft_cap` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> head = tdjax.linen.CrossEntropyHead(1000)
      >>> hidden, labels = jnp.ones((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> variables = head.init(jax.random.key(0), hidden)
      >>> head.apply(variables, hidden).shape
      (2, 5, 1000)
      >>> head.apply(variables, hidden, labels, z_loss=1e-4).shape
      ()
    """

    vocabulary: int | nn.Embed
    _: dataclasses.KW_ONLY
    logits_soft_cap: float | None = None
    use_bias: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init

    def __post_init__(self):
        usual = getattr(nn.Embed, "promote_dtype", None)
        fields = self.vocabulary, self.logits_soft_cap
        check_fields(*fields, nn.Embed, nn.Module, usual)
        super().__post_init__()

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
        dtype = self.dtype
        if dtype is None and isinstance(self.vocabulary, nn.Embed):
            dtype = self.vocabulary.dtype
        return promoted(self._params(hidden.shape[-1]), hidden, dtype)

    @nn.compact
    def _params(self, features: int) -> dict[str, Any]:
        embed, use_bias = self.vocabulary, self.use_bias
        if isinstance(embed, nn.Embed):
            words, params = embed.num_embeddings, {"embedding": embed.embedding}
        else:
            words, shape = embed, (features, embed)
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
            params, use_bias = {"kernel": kernel}, use_bias is not False
        if use_bias:
            bias = self.param("bias", self.bias_init, (words,), self.param_dtype)
            params["bias"] = bias
        return params
