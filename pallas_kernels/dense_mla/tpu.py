"""Masked multi-head attention on TPU: flash attention whose mask is a limit or a packed selection.

Forward: for a head and a block of queries, all blocks of keys follow one another with a running maximum. Backward:
one program for dq in the same order and one for dk and dv with the blocks of queries inside, both with the
probabilities from the log-sum-exp. Pairs of blocks in which nobody sees anybody are skipped. Statistics are rows in
memory and columns in the kernels, where queries stand along the sublanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis, pad_visibility, round_up
from pallas_kernels.pairs import Operand, Pair, over_pairs, product
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import BITS, require_mask
from pallas_kernels.shapes import Array, Bool, Float, UInt32
from pallas_kernels.softmax import LOG2_E, LOW, output_delta, to_base_2
from pallas_kernels.visibility import Visibility

_TILE = 256, 1024  # queries, keys: more keys, fewer rescalings


class _Padded(NamedTuple):
    """The operands as the kernels read them."""

    q: Float[Array, "B H T Q"]
    k: Float[Array, "B H S Q"]
    v: Float[Array, "B H S V"]
    visibility: Visibility
    selected: Array | None
    tile: tuple[int, int]

    def of_queries(self, array) -> Operand:
        """Blocks of an array [B, H, T, X]."""
        return Operand(array, (1, 1, self.tile[0], array.shape[3]), lambda b, h, i, j: (b, h, i, 0))

    def of_keys(self, array) -> Operand:
        """Blocks of an array [B, H, S, X]."""
        return Operand(array, (1, 1, self.tile[1], array.shape[3]), lambda b, h, i, j: (b, h, j, 0))

    def statistics(self, array) -> Operand:
        """Blocks of an array [B, H, 1, T]."""
        return Operand(array, (1, 1, 1, self.tile[0]), lambda b, h, i, j: (b, h, 0, i))

    def inputs(self) -> list[Operand]:
        """Blocks of the selection, where there is one, q, k and v."""
        operands = [self.of_queries(self.q), self.of_keys(self.k), self.of_keys(self.v)]
        return [*selection_operands(self.selected, self.tile), *operands]

    def cost(self, features: int) -> pl.CostEstimate:
        """As if everybody saw everybody; ``features`` is the sum of the products' inner or outer widths."""
        batch, heads, queries, _ = self.q.shape
        pairs = batch * heads * queries * self.k.shape[2]
        memory = 4 * batch * heads * (queries + self.k.shape[2]) * (self.q.shape[3] + self.v.shape[3])
        return pl.CostEstimate(flops=2 * features * pairs, transcendentals=pairs, bytes_accessed=memory)


def dense_mla(
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    v: Float[Array, "B H S V"],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None = None,
    *,
    scale: float,
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H T"]]:
    """See ``api.dense_mla``."""
    return _attend(q, k, v, visibility, selected, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, visibility, selected, scale):
    return _forward(q, k, v, visibility, selected, scale)


def _attend_fwd(q, k, v, visibility, selected, scale):
    o, lse = _forward(q, k, v, visibility, selected, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, k, v, visibility, selected, o, lse)


def pad_selected(
    selected: UInt32[Array, "B W S"] | None, q: Array, k: Array, tile: tuple[int, int]
) -> Array | None:
    """Whole tiles of the packed mask of the queries [B, H, T, Q] and the keys, as int32."""
    if selected is None:
        return None
    require_mask("masked attention", selected, q.shape[2], k.shape[2])
    selected = pad_axis(pad_axis(selected, 1, tile[0] // BITS), 2, tile[1])
    return jax.lax.bitcast_convert_type(selected, jnp.int32)


def selection_operands(selected: Array | None, tile: tuple[int, int]) -> list[Operand]:
    """Blocks of the packed mask, where there is one."""
    if selected is None:
        return []
    return [Operand(selected, (1, tile[0] // BITS, tile[1]), lambda b, h, i, j: (b, i, j))]


def tile_mask(pair: Pair, selected) -> Bool[Array, "Q K"]:
    """True where the query attends to the key: by the packed mask in ``selected``, if there is one."""
    if not selected:
        return pair.visible()
    words = selected[0][0]
    rows = words.shape[0] * BITS
    words = jnp.broadcast_to(words[:, None], (words.shape[0], BITS, words.shape[1])).reshape(rows, -1)
    query = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % BITS
    return (words & (1 << query)) != 0


def _pad(q, k, v, visibility: Visibility, selected) -> _Padded:
    tile = min(_TILE[0], round_up(q.shape[2], BITS)), min(_TILE[1], round_up(k.shape[2], LANES))
    selected = pad_selected(selected, q, k, tile)
    q, k, v = pad_axis(q, 2, tile[0]), pad_axis(k, 2, tile[1]), pad_axis(v, 2, tile[1])
    return _Padded(q, k, v, pad_visibility(visibility, *tile), selected, tile)


def _forward(q, k, v, visibility, selected, scale):
    padded = _pad(q, k, v, visibility, selected)
    batch, heads, queries, _ = padded.q.shape
    o = jax.ShapeDtypeStruct((batch, heads, queries, padded.v.shape[3]), v.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32)
    column = pltpu.VMEM((padded.tile[0], 1), jnp.float32)
    o, lse = over_pairs(
        functools.partial(_forward_kernel, scale=scale),
        padded.inputs(),
        [padded.of_queries(o), padded.statistics(lse)],
        padded.visibility,
        padded.tile,
        name="dense_mla",
        heads=heads,
        scratch=(column, column, pltpu.VMEM((padded.tile[0], padded.v.shape[3]), jnp.float32)),
        cost=padded.cost(padded.q.shape[3] + padded.v.shape[3]),
    )
    return o[:, :, : q.shape[2]], lse[:, :, 0, : q.shape[2]]


def _forward_kernel(pair: Pair, *refs, scale: float):
    *selected, q, k, v, o, lse, highest, sums, total = refs

    @pl.when(pair.first)
    def _():
        highest[...] = jnp.full_like(highest, LOW / 2)
        sums[...] = jnp.zeros_like(sums)
        total[...] = jnp.zeros_like(total)

    @pl.when(pair.live)
    def _():
        scores = product(q[0, 0], k[0, 0], 1, 1) * (scale * LOG2_E)
        scores = jnp.where(tile_mask(pair, selected), scores, LOW)
        before = highest[...]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        p, shrink = jnp.exp2(scores - now), jnp.exp2(before - now)
        highest[...] = now
        sums[...] = sums[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
        total[...] = total[...] * shrink + product(p.astype(v.dtype), v[0, 0], 1, 0)

    @pl.when(pair.last)
    def _():
        seen = sums[...] > 0
        divisor = jnp.where(seen, sums[...], 1)
        o[0, 0] = (total[...] / divisor).astype(o.dtype)
        natural = highest[...] / LOG2_E + jnp.log(divisor)
        lse[0, 0] = _row(jnp.where(seen, natural, -jnp.inf))


def _row(column: Float[Array, "Q 1"]) -> Float[Array, "1 Q"]:
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def column_of(row: Float[Array, "1 Q"]) -> Float[Array, "Q 1"]:
    """Statistics of queries as they stand along the sublanes."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _attend_bwd(scale, residuals, gradients):
    q, k, v, visibility, selected, o, lse = residuals
    d_o, d_lse = gradients
    padded = _pad(q, k, v, visibility, selected)
    delta = output_delta(o, d_o, d_lse)
    lse = to_base_2(lse)
    d_o = pad_axis(d_o.astype(v.dtype), 2, padded.tile[0])
    statistics = [padded.statistics(pad_axis(x[:, :, None], 3, padded.tile[0])) for x in (lse, delta)]
    inputs = [*padded.inputs(), padded.of_queries(d_o), *statistics]

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    qk, vo = q.shape[3], v.shape[3]
    sums_of_queries, *sums_of_keys = (
        pltpu.VMEM((padded.tile[axis], width), jnp.float32) for axis, width in ((0, qk), (1, qk), (1, vo))
    )
    how = {"visibility": padded.visibility, "tile": padded.tile, "heads": q.shape[1]}
    (d_q,) = over_pairs(
        functools.partial(_query_gradient_kernel, scale=scale),
        inputs,
        [padded.of_queries(like(padded.q))],
        **how,
        name="dense_mla_dq",
        scratch=(sums_of_queries,),
        cost=padded.cost(2 * qk + vo),
    )
    d_k, d_v = over_pairs(
        functools.partial(_key_gradients_kernel, scale=scale),
        inputs,
        [padded.of_keys(like(padded.k)), padded.of_keys(like(padded.v))],
        **how,
        name="dense_mla_dkv",
        inner="query",
        scratch=tuple(sums_of_keys),
        cost=padded.cost(2 * qk + 2 * vo),
    )
    gradients = (d[:, :, : x.shape[2]] for d, x in ((d_q, q), (d_k, k), (d_v, v)))
    return *gradients, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _probabilities(pair: Pair, refs, scale: float) -> tuple[Float[Array, "Q K"], Float[Array, "Q K"]]:
    """p, and the gradient of the scores before their scale."""
    *selected, q, k, v, d_o, lse, delta = refs
    scores = product(q[0, 0], k[0, 0], 1, 1) * (scale * LOG2_E)
    p = jnp.where(tile_mask(pair, selected), jnp.exp2(scores - column_of(lse[0, 0])), 0)
    d_p = product(d_o[0, 0], v[0, 0], 1, 1)
    return p, p * (d_p - column_of(delta[0, 0])) * scale


def _query_gradient_kernel(pair: Pair, *refs, scale: float):
    *inputs, d_q, sums = refs
    k = inputs[-5]

    @pl.when(pair.first)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(pair.live)
    def _():
        _, d_scores = _probabilities(pair, inputs, scale)
        sums[...] += product(d_scores.astype(k.dtype), k[0, 0], 1, 0)

    @pl.when(pair.last)
    def _():
        d_q[0, 0] = sums[...].astype(d_q.dtype)


def _key_gradients_kernel(pair: Pair, *refs, scale: float):
    *inputs, d_k, d_v, k_sums, v_sums = refs
    q, d_o = inputs[-6], inputs[-3]

    @pl.when(pair.first)
    def _():
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    @pl.when(pair.live)
    def _():
        p, d_scores = _probabilities(pair, inputs, scale)
        k_sums[...] += product(d_scores.astype(q.dtype), q[0, 0], 0, 0)
        v_sums[...] += product(p.astype(d_o.dtype), d_o[0, 0], 0, 0)

    @pl.when(pair.last)
    def _():
        d_k[0, 0] = k_sums[...].astype(d_k.dtype)
        d_v[0, 0] = v_sums[...].astype(d_v.dtype)
