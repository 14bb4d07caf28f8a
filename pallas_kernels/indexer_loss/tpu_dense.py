"""The indexer's loss under a mask on TPU: the attention of all heads, summed a tile at a time.

The heads of a pair of blocks follow one another and add to one tile of the target in VMEM. What is made of it, a
divergence over [queries of the block, S] float32 numbers, is left to XLA.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import LANES, pad_axis, pad_visibility, round_up
from pallas_kernels.dense_mla.reference import attended
from pallas_kernels.dense_mla.tpu import column_of, pad_selected, selection_operands, tile_mask
from pallas_kernels.indexer_loss.reference import kl_rows
from pallas_kernels.pairs import Operand, Pair, over_pairs, product
from pallas_kernels.selection import BITS
from pallas_kernels.shapes import Array, Float, UInt32
from pallas_kernels.softmax import LOG2_E, to_base_2
from pallas_kernels.visibility import Visibility

_TILE = 1024, 1024  # large: every head reads its queries and keys once for each


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
    target = _target(*jax.lax.stop_gradient((q, k, lse)), visibility, selected, scale)
    return kl_rows(target, scores, attended(visibility, selected))


def _target(q, k, lse, visibility, selected, scale) -> Float[Array, "B T S"]:
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    tile = min(_TILE[0], round_up(queries, BITS)), min(_TILE[1], round_up(keys, LANES))
    selected = pad_selected(selected, q, k, tile)
    q, k = (pad_axis(x, 2, size) for x, size in zip((q, k), tile, strict=True))
    lse = pad_axis(to_base_2(lse)[:, :, None], 3, tile[0])
    shape = (batch, q.shape[2], k.shape[2])
    pairs = math.prod(shape) * heads
    (target,) = over_pairs(
        functools.partial(_kernel, scale=scale, heads=heads),
        [
            *selection_operands(selected, tile),
            Operand(q, (1, 1, tile[0], q.shape[3]), lambda b, h, i, j: (b, h, i, 0)),
            Operand(k, (1, 1, tile[1], k.shape[3]), lambda b, h, i, j: (b, h, j, 0)),
            Operand(lse, (1, 1, 1, tile[0]), lambda b, h, i, j: (b, h, 0, i)),
        ],
        [Operand(jax.ShapeDtypeStruct(shape, jnp.float32), (1, *tile), lambda b, h, i, j: (b, i, j))],
        pad_visibility(visibility, *tile),
        tile,
        name="dense_indexer_loss_target",
        heads=heads,
        inner="head",
        cost=pl.CostEstimate(
            flops=2 * q.shape[3] * pairs, transcendentals=pairs, bytes_accessed=4 * math.prod(shape)
        ),
    )
    return target[:, :queries, :keys]


def _kernel(pair: Pair, *refs, scale: float, heads: int):
    *selected, q, k, lse, target = refs

    @pl.when(pair.first)
    def _():
        target[...] = jnp.zeros_like(target)

    @pl.when(pair.live)
    def _():
        logits = product(q[0, 0], k[0, 0], 1, 1) * (scale * LOG2_E)
        target[0] += jnp.exp2(logits - column_of(lse[0, 0]))

    @pl.when(pair.last)
    def _():
        target[0] = jnp.where(tile_mask(pair, selected), target[0] / heads, 0)
