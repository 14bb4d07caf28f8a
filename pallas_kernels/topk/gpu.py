"""Selection on GPUs: a row is read twice, however long it is.

A sample of the row brackets the k-th highest score. The first pass over the row counts what lies above the bracket
and collects what lies in it, in order; there the threshold is found by bisection on the bits. Where the sample misled
(equal scores, or bad luck), the bracket becomes everything: the room for what is collected is as long as the row, so
nothing is ever lost. The second pass writes the indices of the selected keys, in order, ties by running count.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import round_up
from pallas_kernels.selection import pack_mask
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk.order import MINUS_INFINITY, ordered
from pallas_kernels.topk.reference import highest
from pallas_kernels.triton import barrier, call, store_where

_CHUNK = 2048  # keys at a time, and of the sample
_PROGRAMS = 264  # that share the rows: two for each multiprocessor of a large GPU, with room of their own
_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1


def topk_indices(scores: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """See ``api.topk_indices``."""
    batch, queries, length = scores.shape
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32).reshape(batch * queries, length)
    padded = round_up(length, _CHUNK)
    scores = jnp.pad(scores, [(0, 0), (0, padded - length)], constant_values=-jnp.inf)
    rows, programs = batch * queries, min(batch * queries, _PROGRAMS)
    places = round_up(k + 1, 16)  # the last is for what is not selected, where stores know no mask
    indices, _ = call(
        functools.partial(_kernel, k=min(k, padded), places=places),
        [scores, jnp.full((rows, places), -1, jnp.int32)],
        name="topk_indices",
        grid=(programs,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, places), jnp.int32),
            jax.ShapeDtypeStruct((programs, padded + 16), jnp.int32),
        ],
        warps=8,
        stages=2,
        aliases={1: 0},
        cost=pl.CostEstimate(flops=16 * scores.size, transcendentals=0, bytes_accessed=8 * scores.size),
    )
    return indices[:, :k].reshape(batch, queries, k)


def topk_mask(scores: Float[Array, "B T S"], k: int) -> UInt32[Array, "B W S"]:
    """See ``api.topk_mask``: for short sequences; the reference's passes over the scores, as XLA makes them."""
    return pack_mask(highest(scores, k))


def _number(condition: Array) -> Int[Array, ""]:
    return jnp.sum(condition.astype(jnp.int32))


def _bisect(count, wanted) -> Int[Array, ""]:
    """The largest integer that at least ``wanted`` numbers reach; ``count(x)`` says how many reach x."""

    def set_bit(i, threshold):
        candidate = threshold + (jnp.int32(1) << (31 - i))
        return jnp.where(count(candidate) >= wanted, candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.int32(_LOWEST))


def _kernel(scores, _empty, indices, collected, *, k: int, places: int):
    program, programs = pl.program_id(0), collected.shape[0]
    rows, length = scores.shape

    def select(n, carry):
        row = program + n * programs
        _select_row(scores, indices, collected, row, program, length, k, places)
        return carry

    jax.lax.fori_loop(0, (rows - program + programs - 1) // programs, select, jnp.int32(0))


def _select_row(scores, indices, collected, row, program, length: int, k: int, places: int) -> None:
    chunks, lane = length // _CHUNK, jnp.arange(_CHUNK)
    nowhere = collected.shape[1] - 1

    def keys_of(c):
        return ordered(scores[row, pl.ds(c * _CHUNK, _CHUNK)])

    def collect(low, high, chunks):
        """How many keys are above ``high``, and how many from ``low`` to it were collected."""

        def step(c, counts):
            keys = keys_of(c)
            within = (keys >= low) & (keys <= high)
            place = counts[1] + jnp.cumsum(within.astype(jnp.int32)) - 1
            store_where(collected, program, place, keys, within, nowhere)
            return counts[0] + _number(keys > high), counts[1] + _number(within)

        return jax.lax.fori_loop(0, chunks, step, (jnp.int32(0), jnp.int32(0)))

    sample = ordered(scores[row, lane * chunks])
    expected, spread = k / chunks, 4 * math.sqrt(k / chunks) + 1

    def of_sample(rank: float):
        return _bisect(lambda x: _number(sample >= x), max(1, min(_CHUNK, round(rank))))

    low = of_sample(expected + spread) if expected + spread < _CHUNK else jnp.int32(_LOWEST)
    high = of_sample(expected - spread) if expected > spread else jnp.int32(_HIGHEST)
    barrier()
    above, within = collect(low, high, chunks)
    misled = ((above >= k) | (above + within < k)).astype(jnp.int32)
    barrier()
    _, everything = collect(jnp.int32(_LOWEST), jnp.int32(_HIGHEST), misled * chunks)
    above, within = above * (1 - misled), within * (1 - misled) + everything
    barrier()

    def reach(x):
        def step(c, total):
            place = c * _CHUNK + lane
            return total + _number((collected[program, pl.ds(c * _CHUNK, _CHUNK)] >= x) & (place < within))

        return jax.lax.fori_loop(0, (within + _CHUNK - 1) // _CHUNK, step, jnp.int32(0))

    threshold = _bisect(reach, k - above)
    room = k - above - reach(threshold + 1)

    def write(c, counts):
        keys = keys_of(c)
        tied = (keys == threshold) & (keys > MINUS_INFINITY)
        rank = counts[1] + jnp.cumsum(tied.astype(jnp.int32))
        chosen = (keys > threshold) | (tied & (rank <= room))
        place = counts[0] + jnp.cumsum(chosen.astype(jnp.int32)) - 1
        store_where(indices, row, place, c * _CHUNK + lane, chosen, places - 1)
        return counts[0] + _number(chosen), counts[1] + _number(tied)

    jax.lax.fori_loop(0, chunks, write, (jnp.int32(0), jnp.int32(0)))
