"""What this machine is, and the most it can do: measured, not read off a sheet."""

import importlib.metadata
import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp

_LIBRARIES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "tdjax")


def about() -> dict[str, Any]:
    """Device and versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if device.platform == "cpu" else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def ceilings(quick: bool) -> dict[str, float]:
    """The largest measured rates: matrix products in flop/s, a copy in bytes/s."""
    sizes = (256,) if quick else (512, 1024, 2048, 4096)
    if jax.default_backend() != "cpu":
        sizes = (4096, 8192)
    rates = {
        f"matmul {dtype}": max(_matmul_rate(size, dtype) for size in sizes)
        for dtype in ("float32", "bfloat16")
    }
    lengths = (2**20,) if quick else (2**24, 2**25, 2**26)  # beyond the caches
    return {**rates, "copy": max(map(_copy_rate, lengths))}


def _matmul_rate(size: int, dtype: str) -> float:
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return 2 * size**3 / _fastest(jax.jit(jnp.matmul), a, a)


def _copy_rate(elements: int) -> float:
    x = jax.random.normal(jax.random.key(0), (elements,))
    return 2 * x.nbytes / _fastest(jax.jit(lambda x: -x), x)


def _fastest(fun, *args) -> float:
    jax.block_until_ready(fun(*args))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(fun(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
