"""Selection on TPU: the k-th highest score of every row by bisection on its bits, without a sort.

Scores become integers of the same order, which stay in VMEM. 32 passes over them, each counting how many reach a
candidate, fix one bit of the k-th highest after another. Where several scores equal it and not all have room, a
bisection on the index finds where the room ends. Two integers a row come out, the threshold and that index. A
second kernel reads the scores once more and packs the mask that follows from them, 32 rows into one word a key.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis
from pallas_kernels.platform import UnsupportedError, tpu_interpreter
from pallas_kernels.selection import BITS, unpack_mask
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk.order import MINUS_INFINITY, ordered
from pallas_kernels.topk.reference import indices_of

_ROWS = 16  # a block: two registers deep, so that one's reduction hides behind the other's
_CHUNK = 16 * LANES  # keys a step of a pass
_VMEM_BYTES = 56 << 20
_MOST_KEYS = _VMEM_BYTES // (3 * 4 * _ROWS) // _CHUNK * _CHUNK  # two buffers of scores and the integers
_LOWEST = jnp.iinfo(jnp.int32).min


def topk_mask(scores: Float[Array, "B T S"], k: int) -> UInt32[Array, "B W S"]:
    """See ``api.topk_mask``."""
    rows, length = scores.shape[1:]
    scores = pad_axis(jax.lax.stop_gradient(scores).astype(jnp.float32), 1, BITS)
    scores = jnp.pad(scores, [(0, 0), (0, 0), (0, -length % _CHUNK)], constant_values=-jnp.inf)
    if k < length:
        limits = _thresholds(scores, k)
    else:
        limits = jnp.broadcast_to(jnp.array([MINUS_INFINITY, 0], jnp.int32), (*scores.shape[:2], 2))
    return _packed(scores, limits, rows)[..., :length]


def topk_indices(scores: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """See ``api.topk_indices``."""
    return indices_of(unpack_mask(topk_mask(scores, k), scores.shape[1]), k)


def _thresholds(scores: Float[Array, "B T S"], k: int) -> Int[Array, "B T 2"]:
    """Of each row: what selected keys exceed, or equal before an index; and that index."""
    batch, rows, length = scores.shape
    if length > _MOST_KEYS:
        raise UnsupportedError(
            f"topk: {length} keys in a row do not fit the memory of a TPU core: at most {_MOST_KEYS} do"
        )
    return pl.pallas_call(
        functools.partial(_threshold_kernel, k=k),
        grid=(batch, rows // _ROWS),
        in_specs=[pl.BlockSpec((1, _ROWS, length), lambda b, i: (b, i, 0))],
        out_specs=pl.BlockSpec((1, _ROWS, 2), lambda b, i: (b, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, rows, 2), jnp.int32),
        scratch_shapes=[pltpu.VMEM((_ROWS, length), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES + (4 << 20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=scores.size * 32 * 3, transcendentals=0, bytes_accessed=4 * scores.size
        ),
        interpret=tpu_interpreter(),
        name="topk_threshold",
    )(scores)


def _threshold_kernel(scores, out, keys, *, k):
    chunks = keys.shape[1] // _CHUNK

    def order(c, _):
        place = _chunk(c)
        keys[:, place] = ordered(scores[0, :, place])
        return 0

    jax.lax.fori_loop(0, chunks, order, 0)

    def count(condition) -> Int[Array, "R 1"]:
        """How many keys of each row fulfil ``condition(keys, index)``."""

        def add(c, total):
            chunk = keys[:, _chunk(c)]
            for lane in range(0, _CHUNK, LANES):
                index = c * _CHUNK + lane + jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
                total += jnp.where(condition(chunk[:, lane : lane + LANES], index), 1, 0)
            return total

        total = jax.lax.fori_loop(0, chunks, add, jnp.zeros((_ROWS, LANES), jnp.int32))
        return jnp.sum(total, axis=1, keepdims=True)

    def set_value_bit(i, threshold):
        """From the lowest integer upwards: adding half of what is left keeps at least k keys, or does not."""
        candidate = threshold + (jnp.int32(1) << (31 - i))
        return jnp.where(count(lambda x, _: x >= candidate) >= k, candidate, threshold)

    lowest = jnp.full((_ROWS, 1), _LOWEST, jnp.int32)
    threshold = jax.lax.fori_loop(0, 32, set_value_bit, lowest)
    room = k - count(lambda x, _: x > threshold)
    tied = count(lambda x, _: x == threshold)
    is_key = threshold > MINUS_INFINITY
    out[0] = jnp.concatenate([threshold, jnp.where(is_key, keys.shape[1], 0)], axis=1)

    @pl.when(jnp.max(jnp.where(is_key, tied - room, 0)) > 0)
    def _():
        bits = keys.shape[1].bit_length()

        def set_index_bit(i, end):
            candidate = end + (jnp.int32(1) << (bits - 1 - i))
            within = count(lambda x, index: (x == threshold) & (index < candidate))
            return jnp.where(within <= room, candidate, end)

        end = jax.lax.fori_loop(0, bits, set_index_bit, jnp.zeros((_ROWS, 1), jnp.int32))
        out[0] = jnp.concatenate([threshold, jnp.where(is_key, end, 0)], axis=1)


def _packed(scores: Float[Array, "B T S"], limits: Int[Array, "B T 2"], rows: int) -> UInt32[Array, "B W S"]:
    """The mask of all keys above a row's threshold, and of those at it before its index; of the first rows only."""
    batch, padded_rows, length = scores.shape
    words = padded_rows // BITS
    packed = pl.pallas_call(
        functools.partial(_packing_kernel, rows=rows),
        grid=(batch, words, length // _CHUNK),
        in_specs=[
            pl.BlockSpec((1, BITS, _CHUNK), lambda b, i, j: (b, i, j)),
            pl.BlockSpec((1, BITS, 2), lambda b, i, j: (b, i, 0)),
        ],
        out_specs=pl.BlockSpec((1, 1, 1, _CHUNK), lambda b, i, j: (b, i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((batch, words, 1, length), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=8 * scores.size, transcendentals=0, bytes_accessed=scores.size * 33 // 8
        ),
        interpret=tpu_interpreter(),
        name="topk_pack",
    )(scores, limits)
    return jax.lax.bitcast_convert_type(packed[:, :, 0], jnp.uint32)


def _packing_kernel(scores, limits, out, *, rows):
    keys = ordered(scores[0])
    threshold, end = limits[0, :, 0:1], limits[0, :, 1:2]
    index = pl.program_id(2) * _CHUNK + jax.lax.broadcasted_iota(jnp.int32, (1, _CHUNK), 1)
    place = jax.lax.broadcasted_iota(jnp.int32, (BITS, 1), 0)
    selected = (keys > threshold) | ((keys == threshold) & (index < end))
    selected &= pl.program_id(1) * BITS + place < rows
    out[0, 0] = jnp.sum(jnp.where(selected, jnp.int32(1) << place, 0), axis=0, keepdims=True)


def _chunk(c):
    return pl.ds(pl.multiple_of(c * _CHUNK, _CHUNK), _CHUNK)
