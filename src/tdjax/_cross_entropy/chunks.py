"""Chunks of rows, for `scan`, and chunks of words, inside of it."""

from typing import Any

import jax
import jax.numpy as jnp


def over_words(body, carry, words: int, size: int):
    """Runs `body(carry, start, count)` over the vocabulary, a shorter chunk last."""
    whole, rest = divmod(words, size)
    if whole:
        # Under a second derivative, store no chunk's logits.
        of_chunk = lambda i, carry: body(carry, i * size, size)
        of_chunk = jax.checkpoint(of_chunk, prevent_cse=False)
        carry = jax.lax.fori_loop(0, whole, of_chunk, carry)
    return body(carry, whole * size, rest) if rest else carry


def slice_axis(x, start, count: int, axis: int):
    """`count` entries of an axis, from `start` on."""
    if count == x.shape[axis]:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis)


def add_at(whole, part, start, axis: int):
    """Adds `part` to the entries of an axis of `whole` from `start` on."""
    if part.shape == whole.shape:
        return whole + part
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis)


def in_chunks(rows, size: int):
    """(rows, ...) -> (chunks, size, ...), padded with zeros.

    A chunk takes every n-th row. So where rows are sharded over devices, each device
    holds a part of every chunk.
    """

    def chunk(x):
        chunks = -(-x.shape[0] // size)
        padding = [(0, chunks * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        x = jnp.reshape(jnp.pad(x, padding), (size, chunks, *x.shape[1:]))
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(chunk, rows)


def join_chunks(chunked, rows: Any):
    """(chunks, size, ...) -> (rows, ...): undoes `in_chunks`."""
    rows_first = jnp.moveaxis(chunked, 0, 1)
    return jnp.reshape(rows_first, (-1, *chunked.shape[2:]))[:rows]
