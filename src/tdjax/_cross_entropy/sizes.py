"""How many steps and words a block of logits has."""

from typing import Any, NamedTuple

LEAST_ROWS = 256  # Products of fewer rows are slow.


class Sizes(NamedTuple):
    """The rows and the words of a block: with gradients, and without."""

    rows: int
    words: int
    forward_rows: int
    forward_words: int


class Chunks(NamedTuple):
    """What the user says about blocks: steps, words, and bytes of logits."""

    rows: int | None = None
    words: int | None = None
    most_bytes: int | None = None


class Memory(NamedTuple):
    """What suits a kind of device.

    Attributes:
      little: logits that a block may have at any rate.
      share: a block may have as many logits as all steps divided by this.
      enough_rows: so many rows a block may have, if it has not more logits than `much`.
      rows: it need not have more rows than this.
      in_cache: logits of a block without gradients, or with words in chunks.
    """

    little: int
    share: int
    enough_rows: int
    much: int
    rows: int
    in_cache: int


# On a CPU a block should not push the gradients out of its caches. Elsewhere it should
# have thousands of rows, for the matrix units and to read the kernel less often, and
# split powers of two evenly.
ON_CPU = Memory(2**23, 9, LEAST_ROWS, 2**25, 512, 2**20)
ELSEWHERE = Memory(2**27, 8, 1024, 2**28, 8192, 2**26)


def block_sizes(
    steps: Any, features: int, words: int, chunks: Chunks, itemsize: int
) -> tuple[Sizes, Sizes]:
    """The sizes on a CPU, and those elsewhere; a logit takes `itemsize` bytes."""
    most = None if chunks.most_bytes is None else max(chunks.most_bytes // itemsize, 1)
    options = steps, features, words, chunks.rows, chunks.words, most
    return _sizes_on(ON_CPU, *options), _sizes_on(ELSEWHERE, *options)


def _sizes_on(
    memory: Memory, steps: Any, features: int, words: int, rows, columns, most
) -> Sizes:
    """Small blocks cost more passes over the kernel's gradient, large ones memory.

    A block may have as many logits as `memory` says, or `most` if that is given. Where
    that allows too few steps, the words go in chunks too, and the logits are computed
    twice.
    """
    in_cache = memory.in_cache if most is None else min(memory.in_cache, most)
    little = memory.little if most is None else most
    if rows is None:
        # A symbolic number of steps of `jax.export` can't be compared.
        known = steps if isinstance(steps, int) else None
        bound = little // words
        if most is None:
            enough = min(memory.enough_rows, memory.much // words)
            bound = max(bound, enough, -(-(known or 0) // memory.share))
        rows = max(min(max(memory.rows, features), bound), 1)
        least = LEAST_ROWS if known is None else min(LEAST_ROWS, known)
        if columns is None and bound < least:
            columns = max(in_cache // 1024, 128)
        if columns is not None:
            rows = max(min(1024, little // columns), 1)
    forward_rows = _even(steps, min(1024, max(little // 128, 1)))
    forward_words = max(in_cache // forward_rows, 128)
    if columns is not None:
        forward_words = min(forward_words, columns)
    return Sizes(_even(steps, rows), columns or words, forward_rows, forward_words)


def _even(steps: Any, size: int) -> int:
    """At most `size`, such that the last chunk needs the least padding."""
    if not isinstance(steps, int):
        return size
    chunks = max(-(-steps // size), 1)
    return max(-(-steps // chunks), 1)
