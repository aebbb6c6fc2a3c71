"""Single operations that the layers are made of, by XLA and by PyTorch.

Where XLA's one operation is behind PyTorch's, so is every program made of it: these
are what no lowering can mend.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Calls = dict[str, Callable[[], Any]]


def calls(quick: bool) -> dict[str, Calls]:
    """By operation: the same by each library; PyTorch's only where it is installed."""
    rows, batch = (64, 2) if quick else (1024, 8)
    products = {
        f"product ({rows}, {n}) x ({n}, {n}), {dtype}": _product(rows, n, dtype)
        for n in (64, 256)
        for dtype in ("float32", "bfloat16")
    }
    return {**products, **_convolutions(batch)}


def _product(rows: int, size: int, dtype: str) -> Calls:
    x = np.random.default_rng(0).normal(size=(rows, size)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    found = {"XLA": _jitted(jnp.matmul, *(jnp.asarray(a, dtype) for a in (x, kernel)))}
    torch = _torch()
    if torch is not None:
        kind = getattr(torch, dtype)
        a, b = torch.from_numpy(x).to(kind), torch.from_numpy(kernel).to(kind)
        found["PyTorch"] = lambda: torch.matmul(a, b)
    return found


def _convolutions(batch: int) -> dict[str, Calls]:
    """A 3x3 convolution of 16 channels, its kernel's and its input's gradients."""
    numbers = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)
    x, kernel, ct = make(batch, 64, 64, 16), make(3, 3, 16, 16), make(batch, 64, 64, 16)

    def apply(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    by_x = lambda x, k, ct: jax.vjp(lambda x: apply(x, k), x)[1](ct)
    by_kernel = lambda x, k, ct: jax.vjp(lambda k: apply(x, k), k)[1](ct)
    theirs = _torch_convolutions(x, kernel, ct)
    return {
        name: {"XLA": _jitted(fun, *args), **theirs.get(name, {})}
        for name, fun, args in (
            ("convolution", apply, (x, kernel)),
            ("convolution, gradient of x", by_x, (x, kernel, ct)),
            ("convolution, gradient of the kernel", by_kernel, (x, kernel, ct)),
        )
    }


def _torch_convolutions(x, kernel, ct) -> dict[str, Calls]:
    torch = _torch()
    if torch is None:
        return {}
    last = lambda a: torch.from_numpy(np.array(a)).permute(0, 3, 1, 2)
    x, ct = last(x).requires_grad_(), last(ct)
    kernel = torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1))).requires_grad_()
    run = lambda: torch.nn.functional.conv2d(x, kernel, padding=1)
    y = run()
    grad = lambda by: torch.autograd.grad(y, by, ct, retain_graph=True)
    return {
        "convolution": {"PyTorch": run},
        "convolution, gradient of x": {"PyTorch": lambda: grad(x)},
        "convolution, gradient of the kernel": {"PyTorch": lambda: grad(kernel)},
    }


def _jitted(fun, *args) -> Callable[[], Any]:
    fun, args = jax.jit(fun), jax.tree.map(jnp.asarray, args)
    return lambda: jax.block_until_ready(fun(*args))


def _torch():
    """PyTorch on the CPU, or None where it is missing or JAX is elsewhere."""
    if jax.default_backend() != "cpu":
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch
