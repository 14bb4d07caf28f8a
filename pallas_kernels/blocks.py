"""Arrays cut into the blocks that kernels read: padding, and which pairs of blocks there is anything to do for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Array, Int
from pallas_kernels.visibility import Visibility

LANES = 128  # of a TPU's registers
LEAST = 16  # rows or columns of a matrix product on GPUs
_NONE = jnp.iinfo(jnp.int32)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The smallest power of two that is neither below ``n`` nor below ``LEAST``."""
    return max(LEAST, 1 << (n - 1).bit_length())


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
    """``x`` with zeros behind, so that the axis is a multiple."""
    missing = round_up(x.shape[axis], multiple) - x.shape[axis]
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)])


def pad_visibility(visibility: Visibility, query_block: int, key_block: int) -> Visibility:
    """The same limits; queries and keys behind the last are padding."""
    return Visibility(
        pad_axis(visibility.query_index, 1, query_block),
        pad_axis(visibility.query_segment, 1, query_block),
        pad_axis(visibility.key_segment, 1, key_block),
    )


def live_blocks(visibility: Visibility, query_block: int, key_block: int) -> Int[Array, "B I J"]:
    """1 where some query of block i may see some key of block j; 0 where none does, for certain.

    By ranges of places and segments: exact where segments do not return, as in packed documents.
    """
    index, segment, key = visibility.query_index, visibility.query_segment, visibility.key_segment
    index, segment = (x.reshape(x.shape[0], -1, query_block) for x in (index, segment))
    key = key.reshape(key.shape[0], -1, key_block)
    last_seen = jnp.max(jnp.where(segment != 0, index, -1), axis=-1)[:, :, None]
    (lowest, highest), (key_lowest, key_highest) = _range(segment), _range(key)
    first_key = key_block * jnp.arange(key.shape[1], dtype=jnp.int32)
    overlap = (lowest[:, :, None] <= key_highest[:, None]) & (key_lowest[:, None] <= highest[:, :, None])
    return (overlap & (first_key <= last_seen)).astype(jnp.int32)


def span(live: Array) -> tuple[Array, Array]:
    """Of rows [B, I, J] of blocks with anything to do: the first, and the one after the last."""
    place = jnp.arange(live.shape[2], dtype=jnp.int32)
    first = jnp.min(jnp.where(live, place, live.shape[2]), axis=-1)
    return first, jnp.max(jnp.where(live, place + 1, 0), axis=-1)


def _range(segment: Int[Array, "B I N"]) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """Lowest and highest segment of each block, padding aside; an empty range where there is nothing else."""
    lowest = jnp.min(jnp.where(segment != 0, segment, _NONE.max), axis=-1)
    highest = jnp.max(jnp.where(segment != 0, segment, _NONE.min), axis=-1)
    return lowest, highest


def over_seen_keys(step: Callable[[Any, Any], Any], carry: Any, visibility: Visibility, size: int) -> Any:
    """``carry = step(first key, carry)`` for blocks of ``size`` keys, from the first that anybody may see to the last.

    The number of keys is a multiple. Not differentiable: for forward and backward passes that are written out.
    """
    queries, keys = visibility.query_index.shape[1], visibility.key_segment.shape[1]
    if size == keys:
        return step(0, carry)
    live = jnp.any(live_blocks(visibility, queries, size) != 0, axis=(0, 1))
    place = jnp.arange(keys // size, dtype=jnp.int32)
    first, end = jnp.min(jnp.where(live, place, keys)), jnp.max(jnp.where(live, place + 1, 0))
    return jax.lax.fori_loop(first, end, lambda i, carry: step(i * size, carry), carry)


def map_rows(function: Callable[..., Any], rows: Any, at_a_time: int, carry: Any = None) -> Any:
    """``function(rows)`` for some rows of every array at a time, the results joined.

    As many rows as divide their number, at most ``at_a_time``. With ``carry``, ``function(carry, rows)`` returns the
    next carry and a result, and the last carry comes back with the results.
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    size = next(n for n in range(min(total, at_a_time), 0, -1) if total % n == 0)
    step = function if carry is not None else lambda _, some: (None, function(some))
    if size == total:
        carry, results = step(carry, rows)
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
        carry, results = jax.lax.scan(step, carry, blocks)
        results = jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), results)
    return results if carry is None else (carry, results)
