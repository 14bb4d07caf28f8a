"""The indexer's loss under a mask on GPUs: a tile of queries × keys stays in registers while all heads add to it.

One loop runs over the heads and, within each, over chunks of its features: so small a step leaves shared memory for
copies three steps ahead, and the products of the next run on while those of the last are waited for. What is made of
the tile, a divergence over [queries of the block, S] float32 numbers, is left to XLA.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import LEAST, pad_axis
from pallas_kernels.dense_mla.gpu import attended_words, belongs, rows_of_queries, tile_sizes
from pallas_kernels.indexer_loss.reference import kl_rows
from pallas_kernels.selection import unpack_mask
from pallas_kernels.shapes import Array, Float, UInt32
from pallas_kernels.softmax import LOG2_E, to_base_2
from pallas_kernels.triton import call, dot, exp2
from pallas_kernels.visibility import Visibility

_TILE = 128, 128  # large: every head reads its queries and keys once for each
_FEATURES = 64  # of a chunk, at most


def dense_indexer_loss(
    scores: Float[Array, "B T S"],
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    lse: Float[Array, "B H T"],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B T"]:
    """See ``api.dense_indexer_loss``."""
    words = attended_words(q, k, visibility, selected)
    target = _target(*jax.lax.stop_gradient((q, k, lse)), words, scale)
    return kl_rows(target, scores, unpack_mask(words, q.shape[2]))


def _target(q, k, lse, words, scale) -> Float[Array, "B T S"]:
    """The attention of all heads to each key, averaged; 0 for a key that the query does not attend to."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    tile = tile_sizes(_TILE, queries, keys, k.dtype)
    q, k = (pad_axis(pad_axis(x, 2, size), 3, LEAST) for x, size in zip((q, k), tile, strict=True))
    shape = batch, q.shape[2], k.shape[2]
    pairs = math.prod(shape) * heads
    (target,) = call(
        functools.partial(_kernel, tile=tile, scale=scale),
        [*rows_of_queries(words, tile), q, k, pad_axis(-to_base_2(lse), 2, tile[0])],
        name="dense_indexer_loss_target",
        # Tiles of the same keys one after another: they are many, and the queries of a block stay in the cache.
        grid=(shape[1] // tile[0], batch * shape[2] // tile[1]),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        warps=8,
        stages=4,
        cost=pl.CostEstimate(
            flops=2 * q.shape[3] * pairs, transcendentals=pairs, bytes_accessed=4 * math.prod(shape)
        ),
    )
    return target[:, :queries, :keys]


def _kernel(words, first, end, q, k, minus_lse, target, *, tile: tuple[int, int], scale: float):
    width = min(_FEATURES, k.shape[3] & -k.shape[3])  # a power of two that divides them
    blocks, chunks = k.shape[2] // tile[1], k.shape[3] // width
    i, b, j = pl.program_id(0), pl.program_id(1) // blocks, pl.program_id(1) % blocks
    queries, keys = pl.ds(i * tile[0], tile[0]), pl.ds(j * tile[1], tile[1])

    def add_chunk(n, carry):
        scores, total = carry
        h, c = jax.lax.div(n, chunks), jax.lax.rem(n, chunks)
        features = pl.ds(c * width, width)
        offset = minus_lse[b, h, queries][:, None]
        scores += dot(q[b, h, queries, features], k[b, h, keys, features].T)

        def finish_head():
            return jnp.zeros_like(scores), total + exp2(scores, scale * LOG2_E, offset)

        return jax.lax.cond(c == chunks - 1, finish_head, lambda: (scores, total))

    live = (first[b, i] <= j) & (j < end[b, i])
    steps = live.astype(jnp.int32) * (q.shape[1] * chunks)  # none where there is nothing to do
    zeros = jnp.zeros(tile, jnp.float32)
    _, total = jax.lax.fori_loop(0, steps, add_chunk, (zeros, zeros))
    mask = belongs(words, b, queries, j, tile[1])
    target[b, queries, keys] = jnp.where(mask, total / q.shape[1], 0)
