"""Several processes that tune together.

They run the same programs in the same order, since a program of a whole mesh waits for
all processes. So whatever depends on a clock, a file or one process's arrays is decided
for all: by process 0, or by all together. With one process these functions do nothing.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the process that reports, and reads and writes files."""
    return jax.process_index() == 0


def agreed(number: float) -> float:
    """Process 0's number."""
    if jax.process_count() == 1:
        return number
    return float(_broadcast(np.float32(number)))


def agreed_text(text: str | None) -> str | None:
    """Process 0's text."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer((text or "").encode(), np.uint8)
    size = int(_broadcast(np.int32(-1 if text is None else content.size)))
    if size < 0:
        return None
    mine = content if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(_broadcast(mine))).decode()


def in_all(flag: bool) -> bool:
    """Whether it is true in every process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


def together(action: Callable[[], T]) -> T:
    """What it returns; if it fails in one process, all raise, and none waits."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    if not in_all(failure is None):
        raise failure or RuntimeError("autotune failed in another process.")
    return cast(T, result)


def _broadcast(x):
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(x)
