"""PyTorch's nested tensors, jagged layout, over the valid steps of a ragged batch.

Eager, on the device that JAX is on. A batch is `(batch, j, *step)`, where j is each
example's own length. All operations are of nested tensors, none of their `values()`.
The gradient of a convolution is missing, because nested tensors have none.

The input is nested before the clock starts, and results are padded after it stops;
the JAX programs beside it take and return padded arrays.
"""

import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks.candidate import Program
from benchmarks.layers import CONVOLUTIONS, HEADS

# Where the axes of JAX's parameters go: biases, kernels, kernels of convolutions.
_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def program(case, of: str, lengths: jax.Array) -> Program:
    """A case of `benchmarks.ragged`, with how many steps of each example are valid."""
    nested = TorchNested(case, of, lengths)
    return Program(nested.call, nested.results, None, None)


class TorchNested:
    """The layer, its parameters and its nested input, as PyTorch has them."""

    def __init__(self, case, of: str, lengths: jax.Array):
        import torch

        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch has no CUDA")
        if case.layer == "conv net" and of == "gradient":
            raise NotImplementedError("nested tensors have no gradient of convolutions")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch, self._gradient = torch, of == "gradient"
        self._device = "cuda" if on_gpu else "cpu"
        self._wait = torch.cuda.synchronize if on_gpu else time.perf_counter
        self._layer = {"conv net": _conv_net, "transformer block": _block}[case.layer]
        self._mask = np.arange(case.x.shape[1]) < np.array(lengths)[:, None]
        self._params = jax.tree.map(self._parameter, case.params)
        self._x = self._nested(np.array(case.x))

    def _parameter(self, a: jax.Array):
        form = "channels_last" if a.ndim == 4 else "contiguous_format"
        tensor = self._torch.from_numpy(np.array(a)).permute(_AXES[a.ndim])
        tensor = tensor.contiguous(memory_format=getattr(self._torch, form))
        return tensor.to(self._device).requires_grad_(self._gradient)

    def _nested(self, x: np.ndarray):
        return self._torch.nested.nested_tensor(
            [self._torch.from_numpy(each[valid]) for each, valid in zip(x, self._mask)],
            layout=self._torch.jagged,
            device=self._device,
            requires_grad=self._gradient,
        )

    def call(self) -> list[Any]:
        with self._torch.set_grad_enabled(self._gradient):
            y = self._layer(self._torch.nn.functional, self._params, self._x)
        out = self._loss_and_gradients(y) if self._gradient else [y]
        self._wait()
        return out

    def _loss_and_gradients(self, y) -> list[Any]:
        """The mean of sin(y) over all steps: it is zero where y is masked."""
        loss = self._torch.sin(y).sum() / (self._mask.size * y.values()[0].numel())
        inputs = [*jax.tree.leaves(self._params), self._x]
        return [loss.detach(), *self._torch.autograd.grad(loss, inputs)]

    def results(self, out) -> list[np.ndarray]:
        """In the order of JAX's leaves: y; or loss, gradients by parameters and x."""
        if not self._gradient:
            return [self._padded(out[0])]
        loss, *of_params, of_x = out
        kernels = [a.permute(*np.argsort(_AXES[a.ndim]).tolist()) for a in of_params]
        return [*(a.cpu().numpy() for a in (loss, *kernels)), self._padded(of_x)]

    def _padded(self, nested) -> np.ndarray:
        values = nested.values().cpu().numpy()
        padded = np.zeros((*self._mask.shape, *values.shape[1:]), values.dtype)
        padded[self._mask] = values
        return padded


def _conv_net(functional, params, x):
    x = x.permute(0, 1, 4, 2, 3)  # a view that is channels-last in memory
    for name in CONVOLUTIONS:
        weight, bias = params[name]["kernel"], params[name]["bias"]
        x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
    return x.permute(0, 1, 3, 4, 2)


def _block(functional, params, x):
    """The transformer block of `benchmarks.ragged`: `(batch, j, tokens, features)`."""
    linear = lambda p, x: functional.linear(x, p["kernel"], p["bias"])
    norm = lambda p, x: functional.layer_norm(
        x, x.shape[-1:], p["scale"], p["bias"], 1e-6
    )
    first, second = params["norms"]
    x = x + _attention(functional, linear, params["attention"], norm(first, x))
    widen, narrow = params["mlp"]
    hidden = functional.gelu(linear(widen, norm(second, x)), approximate="tanh")
    return x + linear(narrow, hidden)


def _attention(functional, linear, params, x):
    """Tokens of one step attend to each other; the steps are a batch."""
    split = lambda a: a.unflatten(-1, (HEADS, -1)).transpose(-2, -3)
    heads = [split(linear(params[name], x)) for name in ("query", "key", "value")]
    y = functional.scaled_dot_product_attention(*heads)
    return linear(params["out"], y.transpose(-2, -3).flatten(-2))
