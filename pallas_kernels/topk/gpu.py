"""Selection on GPUs: a row is read once, but for a few.

A sample of the row says which score somewhat more than k keys reach (about twice k, of 2,048 of 128K). One pass over
the row collects those that reach it, with their indices, in order; among them the threshold is found by bisection, and
of them the selected are written, ties by running count. Where the sample misled (equal scores, or bad luck), fewer
than k were collected or more than there is room for: then the row itself is bisected and written from, so nothing is
ever lost.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import round_up
from pallas_kernels.selection import BITS
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk.order import MINUS_INFINITY, score_of
from pallas_kernels.triton import barrier, call, store_where

_CHUNKS = {1024: 4, 4096: 8}  # keys at a time, and of the sample; and the warps that share them
_FEW_ROWS, _LONG_ROW = 264, 1 << 18  # below and above which chunks are long
# Programs that share the rows, each with room of its own: eight for each multiprocessor of a large GPU.
_PROGRAMS = 1056
# The integers of the lowest score that counts, and behind that of inf.
_LOWEST, _HIGHEST = MINUS_INFINITY + 1, 0x7F800001


def topk_indices(scores: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """See ``api.topk_indices``."""
    batch, queries, length = scores.shape
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32).reshape(batch * queries, length)
    rows, programs = batch * queries, min(batch * queries, _PROGRAMS)
    short, long = _CHUNKS
    chunk = long if length > _LONG_ROW or (rows < _FEW_ROWS and length >= 2 * long) else short
    padded = round_up(length, chunk)
    scores = jnp.pad(scores, [(0, 0), (0, padded - length)], constant_values=-jnp.inf)
    places = round_up(k + 1, 16)  # the last is for what is not selected, where stores know no mask
    stride = padded // chunk
    rank = _rank(min(k, padded), stride, chunk)
    room = min(padded, round_up(2 * rank * stride, chunk) + chunk)  # twice what is expected
    collected = [jax.ShapeDtypeStruct((programs, room + 16), dtype) for dtype in (jnp.float32, jnp.int32)]
    indices, *_ = call(
        functools.partial(_kernel, chunk=chunk, k=min(k, padded), rank=rank, room=room, places=places),
        [scores, jnp.full((rows, places), -1, jnp.int32)],
        name="topk_indices",
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct((rows, places), jnp.int32), *collected],
        warps=_CHUNKS[chunk],
        stages=2,
        aliases={1: 0},
        cost=pl.CostEstimate(flops=8 * scores.size, transcendentals=0, bytes_accessed=4 * scores.size),
    )
    return indices[:, :k].reshape(batch, queries, k)


def topk_mask(scores: Float[Array, "B T S"], k: int) -> UInt32[Array, "B W S"]:
    """See ``api.topk_mask``: the bits of the list, each added to its word."""
    indices = topk_indices(scores, k)
    batch, queries, keys = scores.shape
    query = jnp.arange(queries, dtype=jnp.int32)[:, None]
    bits = jnp.uint32(1) << (query % BITS).astype(jnp.uint32)
    words = jnp.zeros((batch, -(-queries // BITS), keys), jnp.uint32)
    where = jnp.arange(batch)[:, None, None], query // BITS, jnp.where(indices < 0, keys, indices)
    return words.at[where].add(jnp.broadcast_to(bits, indices.shape), mode="drop")


def _rank(k: int, stride: int, most: int) -> int:
    """In a sample of every ``stride``-th key: how many reach what k keys of the row almost certainly reach."""
    return min(most, math.ceil(k / stride + 4 * math.sqrt(k / stride) + 1))


class _Scores(NamedTuple):
    """Scores in order of their index, a chunk at a time: those of a row, or those that were collected of it."""

    read: Callable[[Array], tuple[Float[Array, "C"], Int[Array, "C"]]]
    """Of chunk c: scores, -inf where there is none, and indices in the row."""

    chunk: int
    chunks: Array | int


def _kernel(
    scores, _empty, indices, collected, where, *, chunk: int, k: int, rank: int, room: int, places: int
):
    program, programs = pl.program_id(0), collected.shape[0]
    rows, length = scores.shape
    lane = jnp.arange(chunk)

    def select(n, carry):
        row = program + n * programs

        def of_row(c):
            return scores[row, pl.ds(c * chunk, chunk)], c * chunk + lane

        whole = _Scores(of_row, chunk, length // chunk)
        sample = scores[row, lane * whole.chunks]
        low = _bisect(lambda score: _number(sample >= score), rank, rank + rank // 8, _LOWEST, _HIGHEST)
        barrier()  # nobody reads any more what was collected of the row before
        end, count = _collect(whole, score_of(low), room, program, collected, where)
        barrier()

        def of_collected(c):
            place = pl.ds(c * chunk, chunk)
            found = jnp.where(c * chunk + lane < count, collected[program, place], -jnp.inf)
            return found, where[program, place]

        def write_of(source: _Scores, low):
            threshold, left = _threshold(source, k, low)
            _write(source, threshold, left, indices, row, places)

        misled = (end < whole.chunks) | ((count < k) & (low > _LOWEST))
        jax.lax.cond(
            misled,
            lambda: write_of(whole, jnp.int32(_LOWEST)),
            lambda: write_of(_Scores(of_collected, chunk, (count + chunk - 1) // chunk), low),
        )
        return carry

    jax.lax.fori_loop(0, (rows - program + programs - 1) // programs, select, jnp.int32(0))


def _number(condition: Array) -> Int[Array, ""]:
    return jnp.sum(condition.astype(jnp.int32))


def _bisect(reach, wanted, most, low, high) -> Int[Array, ""]:
    """The key of a score that ``wanted`` to ``most`` scores reach, else the highest that at least ``wanted`` do.

    ``reach(score)`` says how many do: as many as are wanted, or all that count, reach ``low``, too few ``high``.
    """

    def is_open(state):
        low, high, reached = state
        return (reached > most) & (high - low != 1)

    def halve(state):
        low, high, reached = state
        middle = low + jax.lax.shift_right_logical(high - low, 1)  # their distance has no sign
        number = reach(score_of(middle))
        enough = number >= wanted
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, number, reached),
        )

    return jax.lax.while_loop(is_open, halve, (jnp.int32(low), jnp.int32(high), jnp.int32(2**31 - 1)))[0]


def _collect(row: _Scores, low, room: int, program, collected, where) -> tuple[Array, Array]:
    """Puts scores that reach ``low`` where there is room, until another chunk may not fit.

    Returns the chunk at which it ended, and how many it put there.
    """

    def fits(state):
        c, count = state
        return (c < row.chunks) & (count + row.chunk <= room)

    def step(state):
        c, count = state
        found, index = row.read(c)
        within = found >= low
        place = count + jnp.cumsum(within.astype(jnp.int32)) - 1
        store_where(collected, program, place, found, within, room)
        store_where(where, program, place, index, within, room)
        return c + 1, count + _number(within)

    return jax.lax.while_loop(fits, step, (jnp.int32(0), jnp.int32(0)))


def _threshold(source: _Scores, k: int, low) -> tuple[Array, Array]:
    """The k-th highest score, or one that parts the row as it does; and how many that equal it are selected."""

    def number(holds: Callable[[Array], Array]):
        def step(c, total):
            return total + holds(source.read(c)[0]).astype(jnp.int32)

        return jnp.sum(jax.lax.fori_loop(0, source.chunks, step, jnp.zeros((source.chunk,), jnp.int32)))

    threshold = score_of(_bisect(lambda x: number(lambda scores: scores >= x), k, k, low, _HIGHEST))
    return threshold, k - number(lambda scores: scores > threshold)


def _write(source: _Scores, threshold, left, indices, row, places: int) -> None:
    """The selected in order: above the threshold, and the first ``left`` that equal it."""

    def step(c, counts):
        found, index = source.read(c)
        above, tied = found > threshold, found == threshold
        # Two counts in one integer: a chunk has far fewer than 2^16 keys.
        both = above.astype(jnp.int32) + (tied.astype(jnp.int32) << 16)
        upto = jnp.cumsum(both)
        ranks = counts[0] + (upto & 0xFFFF), counts[1] + (upto >> 16)
        chosen = above | (tied & (ranks[1] <= left))
        place = ranks[0] + jnp.minimum(ranks[1], left) - 1
        store_where(indices, row, place, index, chosen, places - 1)
        total = jnp.sum(both)
        return counts[0] + (total & 0xFFFF), counts[1] + (total >> 16)

    jax.lax.fori_loop(0, source.chunks, step, (jnp.int32(0), jnp.int32(0)))
