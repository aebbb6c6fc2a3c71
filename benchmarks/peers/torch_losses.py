"""PyTorch's loss of a softmax head: on all logits, and its own chunked one."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.candidate import Program


class TorchLoss:
    """`cross_entropy` of `linear`, or `linear_cross_entropy` in chunks, eager.

    On the device that JAX is on. The chunked one has PyTorch's default options.
    """

    def __init__(self, args: tuple, of: str, chunked: bool):
        import torch

        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch has no CUDA")
        if chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise NotImplementedError("this PyTorch has no chunked loss")
        self._torch, self._gradient, self._chunked = torch, of == "gradient", chunked
        self._wait = torch.cuda.synchronize if on_gpu else time.perf_counter
        params, hidden, labels = args
        put = lambda a: self._from_jax(a).to("cuda" if on_gpu else "cpu")
        self._args = [put(a) for a in (hidden, params["kernel"].T, params["bias"])]
        self._labels = put(labels)
        for a in self._args:
            a.requires_grad_(self._gradient)

    def _from_jax(self, a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return self._torch.from_numpy(np.array(a, np.int64))
        tensor = self._torch.from_numpy(np.array(a.astype(jnp.float32)))
        return tensor.to(getattr(self._torch, a.dtype.name)).contiguous()

    def program(self) -> Program:
        return Program(self.call, self.results, None, None)

    def call(self) -> list[Any]:
        loss = self._loss()
        out = [loss.detach()]
        if self._gradient:
            out += self._torch.autograd.grad(loss, self._args)
        self._wait()
        return out

    def _loss(self):
        functional = self._torch.nn.functional
        hidden, weight, bias = self._args
        if self._chunked:
            options = self._torch.nn.LinearCrossEntropyOptions()
            return functional.linear_cross_entropy(
                hidden, weight, self._labels, linear_bias=bias, options=options
            )
        logits = functional.linear(hidden, weight, bias).float()
        return functional.cross_entropy(logits, self._labels)

    def results(self, out) -> list[np.ndarray]:
        """In the order of JAX's leaves: loss, bias, kernel, hidden."""
        arrays = [a.float().cpu().numpy() for a in out]
        if not self._gradient:
            return arrays
        loss, hidden, weight, bias = arrays
        return [loss, bias, weight.T, hidden]
