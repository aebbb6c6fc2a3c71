"""How long a compiled program takes, and where its arrays are."""

import time
from typing import Any

import jax


def timed(program, args, calls: int = 1) -> tuple[float, Any]:
    """Seconds per call, and the result of the last call."""
    y = None
    # Of several calls at once, the collectives of virtual devices may wait for ever.
    wait = jax.block_until_ready if _are_on_several(args) else lambda y: y
    start = time.perf_counter()
    for _ in range(calls):
        y = wait(program(*args))
    jax.block_until_ready(y)
    return (time.perf_counter() - start) / calls, y


def device_of(args: Any) -> Any:
    """The first device of the first array."""
    arrays = _arrays(args)
    devices = sorted(arrays[0].devices(), key=lambda d: d.id) if arrays else []
    return devices[0] if devices else jax.devices()[0]


def _are_on_several(args: Any) -> bool:
    """Whether arrays are on more than one device."""
    return any(len(x.sharding.device_set) > 1 for x in _arrays(args))


def _arrays(args: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
