"""The contract of the selection, without a sort.

The k-th highest score of a row is found by bisection on the bits of the scores: 32 times a row is compared with a
candidate and what reaches it counted. Few rows at a time, so that they stay in a core's cache meanwhile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import map_rows, pad_axis, round_up
from pallas_kernels.selection import pack_mask
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.topk.order import MINUS_INFINITY, ordered

_CACHED = 1 << 18  # scores: 1 MB
_GROUPS = 32  # of a row, whose counts are added up element by element in bytes: what CPUs do 64 of at a time
_WORD = 32  # keys whose membership is one word
_LOWEST = jnp.iinfo(jnp.int32).min


def topk_mask(scores: Float[Array, "B T S"], k: int) -> UInt32[Array, "B W S"]:
    """See ``api.topk_mask``."""
    return pack_mask(highest(scores, k))


def topk_indices(scores: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """See ``api.topk_indices``."""
    return _by_rows(lambda rows: indices_of(_highest(rows, k), k), scores)


def highest(scores: Float[Array, "B T S"], k: int) -> Bool[Array, "B T S"]:
    """True at the selected keys."""
    return _by_rows(lambda rows: _highest(rows, k), scores)


def _by_rows(function: Callable[[Array], Array], scores: Float[Array, "B T S"]) -> Array:
    """``function`` of as many rows at a time as a cache holds."""
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    rows = scores.reshape(-1, scores.shape[-1])
    return map_rows(function, rows, max(1, _CACHED // rows.shape[1])).reshape(*scores.shape[:-1], -1)


def _highest(scores: Float[Array, "R S"], k: int) -> Bool[Array, "R S"]:
    length = scores.shape[1]
    if k >= length:
        return scores > -jnp.inf
    missing = -length % _GROUPS
    keys = jnp.pad(ordered(scores), [(0, 0), (0, missing)], constant_values=_LOWEST)
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    tied = (keys == threshold) & (keys > MINUS_INFINITY)
    room = k - _count(above)
    tied = jax.lax.cond(jnp.any(_count(tied) > room), _first, lambda tied, _: tied, tied, room)
    return (above | tied)[:, :length]


def _count(mask: Bool[Array, "R S"]) -> Int[Array, "R 1"]:
    """How many are true, of a multiple of ``_GROUPS``."""
    groups = mask.reshape(mask.shape[0], _GROUPS, -1).astype(jnp.int8)
    return jnp.sum(jnp.sum(groups, axis=1, dtype=jnp.int8), axis=-1, keepdims=True, dtype=jnp.int32)


def _kth_largest(keys: Int[Array, "R S"], k: int) -> Int[Array, "R 1"]:
    """A value that at least ``k`` keys of a row reach and at most ``k`` exceed.

    It is the k-th largest, or one that parts the row in the same way.
    Bits that only tell apart what is on the same side of it are not looked at.
    """

    def is_open(state):
        bit, _, reached = state
        return (bit >= 0) & jnp.any(reached != k)

    def set_bit(state):
        bit, threshold, reached = state
        candidate = threshold + (jnp.int32(1) << bit)
        count = _count(keys >= candidate)
        enough = count >= k
        return bit - 1, jnp.where(enough, candidate, threshold), jnp.where(enough, count, reached)

    lowest = jnp.full((keys.shape[0], 1), _LOWEST, jnp.int32)
    _, threshold, _ = jax.lax.while_loop(is_open, set_bit, (jnp.int32(31), lowest, jnp.full_like(lowest, -1)))
    return threshold


def _first(mask: Bool[Array, "R S"], room: Int[Array, "R 1"]) -> Bool[Array, "R S"]:
    """The first ``room`` true places of each row: bisection for the longest prefix that holds no more."""
    index = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    bits = mask.shape[-1].bit_length()

    def set_bit(i, end):
        candidate = end | (1 << (bits - 1 - i))
        return jnp.where(_count(mask & (index < candidate)) <= room, candidate, end)

    end = jax.lax.fori_loop(0, bits, set_bit, jnp.zeros(room.shape, jnp.int32))
    return mask & (index < end)


def indices_of(mask: Bool[Array, "*B S"], k: int) -> Int[Array, "*B K"]:
    """A mask with at most ``k`` keys a row as a list: the word in which the n-th key lies, and the bit of it there."""
    *batch, length = mask.shape
    mask = pad_axis(mask.reshape(-1, length), 1, _WORD).reshape(-1, round_up(length, _WORD) // _WORD, _WORD)
    words = jnp.sum(mask.astype(jnp.uint32) << jnp.arange(_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    count = jax.lax.population_count(words).astype(jnp.int32)
    upto = jnp.cumsum(count, axis=-1)
    rank = jnp.arange(k, dtype=jnp.int32)
    place = jax.vmap(lambda row: jnp.searchsorted(row, rank, side="right"))(upto)
    place = jnp.minimum(place, words.shape[1] - 1)
    word, before = (jnp.take_along_axis(x, place, axis=-1) for x in (words, upto - count))
    index = place.astype(jnp.int32) * _WORD + _place_of_bit(word, rank - before)
    return jnp.where(rank < upto[:, -1:], index, -1).reshape(*batch, k)


def _place_of_bit(word: UInt32[Array, "R K"], rank: Int[Array, "R K"]) -> Int[Array, "R K"]:
    """Where the bit of a word stands that has ``rank`` others below it: by halves, quarters and so on."""
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << half) - 1)
        count = jax.lax.population_count(low).astype(jnp.int32)
        is_high = rank >= count
        word = jnp.where(is_high, word >> half, low)
        rank, place = jnp.where(is_high, rank - count, rank), jnp.where(is_high, place + half, place)
    return place
