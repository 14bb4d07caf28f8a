"""The contract of the selection, without a sort.

A full sort of every row costs several times more than finding the k-th score by bisection on the bits of the
scores and keeping what lies above it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.selection import pack_mask
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.topk.order import ordered

_CHUNK = 128  # keys whose running count is one product with a triangular matrix


def _ordered_bits(scores: Float[Array, "*B S"]) -> UInt32[Array, "*B S"]:
    """Unsigned integers in the order of the scores, at least 1 for every number."""
    return jax.lax.bitcast_convert_type(ordered(scores.astype(jnp.float32)), jnp.uint32) ^ jnp.uint32(1 << 31)


def _count(mask: Bool[Array, "*B S"]) -> Float[Array, "*B 1"]:
    """How many are true. In float32, exact up to 16 million keys: CPUs sum it twice as fast as int32."""
    return jnp.sum(mask.astype(jnp.float32), axis=-1, keepdims=True)


def _kth_largest(keys: UInt32[Array, "*B S"], k: int) -> UInt32[Array, "*B 1"]:
    """The largest value that at least ``k`` keys of a row reach (0 where fewer than k are above 0)."""

    def set_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(_count(keys >= candidate) >= k, candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((*keys.shape[:-1], 1), jnp.uint32))


def _first(mask: Bool[Array, "*B S"], room: Float[Array, "*B 1"]) -> Bool[Array, "*B S"]:
    """The first ``room`` true places of each row: bisection for the longest prefix that holds no more."""
    index = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    bits = mask.shape[-1].bit_length()

    def set_bit(i, end):
        candidate = end | (1 << (bits - 1 - i))
        return jnp.where(_count(mask & (index < candidate)) <= room, candidate, end)

    end = jax.lax.fori_loop(0, bits, set_bit, jnp.zeros(room.shape, jnp.int32))
    return mask & (index < end)


def topk_mask(scores: Float[Array, "B T S"], k: int) -> UInt32[Array, "B W S"]:
    """See ``api.topk_mask``."""
    return pack_mask(highest(scores, k))


def highest(scores: Float[Array, "B T S"], k: int) -> Bool[Array, "B T S"]:
    """True at the selected keys."""
    scores = jax.lax.stop_gradient(scores)
    visible = scores > -jnp.inf
    if k >= scores.shape[-1]:
        return visible
    keys = jnp.where(visible, _ordered_bits(scores), 0)
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    tied = visible & (keys == threshold)
    room = k - _count(above)
    tied = jax.lax.cond(jnp.any(_count(tied) > room), _first, lambda tied, _: tied, tied, room)
    return above | tied


def _running_count(mask: Bool[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Inclusive prefix sum. Chunks go through a matrix product: XLA's ``cumsum`` is far slower on every platform."""
    *rows, length = mask.shape
    chunks = -(-length // _CHUNK)
    padded = jnp.pad(mask, [(0, 0)] * len(rows) + [(0, chunks * _CHUNK - length)])
    padded = padded.reshape(*rows, chunks, _CHUNK).astype(jnp.float32)
    upto = jnp.triu(jnp.ones((_CHUNK, _CHUNK), jnp.float32))
    within = jnp.matmul(padded, upto).astype(jnp.int32)
    totals = within[..., -1]
    before = jnp.cumsum(totals, axis=-1) - totals
    return (within + before[..., None]).reshape(*rows, chunks * _CHUNK)[..., :length]


def topk_indices(scores: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """See ``api.topk_indices``."""
    return indices_of(highest(scores, k), k)


def indices_of(mask: Bool[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """A mask with at most ``k`` keys a row as a list: the n-th index is where its running count first reaches n."""
    count = _running_count(mask)
    wanted = jnp.arange(1, k + 1, dtype=jnp.int32)
    rows = count.reshape(-1, count.shape[-1])
    found = jax.vmap(lambda row: jnp.searchsorted(row, wanted, side="left"))(rows)
    found = found.reshape(*count.shape[:-1], k)
    return jnp.where(wanted <= count[..., -1:], found, -1).astype(jnp.int32)
