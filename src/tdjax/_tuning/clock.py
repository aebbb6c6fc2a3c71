"""How long a compiled program takes."""

import time
from typing import Any

import jax


def timed(program, args, calls: int = 1) -> tuple[float, Any]:
    """Seconds per call, and the result of the last call."""
    y = None
    start = time.perf_counter()
    for _ in range(calls):
        y = program(*args)
    jax.block_until_ready(y)
    return (time.perf_counter() - start) / calls, y
