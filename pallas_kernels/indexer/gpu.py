"""Index scores on GPUs: a tile of queries × keys stays in registers while all heads add to it.

Forward: for each head the tile of q [Q, J] meets the keys [K, J]; ReLU, weight and sum follow in registers. Backward,
with ``g = dI · 1[q·k > 0]``: one kernel for a block of queries and a head, over the keys it may see, gives
``dq = w · (g k)`` and ``dw = q · (g k)``; one for a block of keys, over queries and heads, gives
``dk = Σ_n (w g)ᵀ q``. Blocks in which nobody sees anybody cost a row of -inf.

Operands in e4m3 become float16, which holds each of them exactly: queries beforehand, keys in registers, which asks
for compute capability 8.9. Triton's product of e4m3 itself is no wgmma on Hopper as long as its sums are to be exact.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import live_blocks, pad_axis, pad_visibility, power_of_two, span
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.triton import call, dot, fma
from pallas_kernels.visibility import Visibility

_TILE, _GRADIENT_TILE = (64, 128), (128, 128)  # queries × keys, at most
_FLOAT32_TILE = 32, 64  # whose products want registers for both sides


class _Padded(NamedTuple):
    """The operands as the kernels read them."""

    q: Float[Array, "B T N J"]
    k: Float[Array, "B S J"]
    w: Float[Array, "B T N"]
    query_index: Int[Array, "B T"]
    query_segment: Int[Array, "B T"]
    key_segment: Int[Array, "B S"]

    @property
    def visibility(self) -> Visibility:
        return Visibility(self.query_index, self.query_segment, self.key_segment)

    def cost(self, products: int) -> pl.CostEstimate:
        """As if everybody saw everybody."""
        pairs = self.q.shape[0] * self.q.shape[1] * self.k.shape[1]
        width = self.q.shape[2] * self.q.shape[3]
        return pl.CostEstimate(
            flops=2 * products * width * pairs, transcendentals=0, bytes_accessed=4 * pairs
        )


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    visibility: Visibility,
    k_scale: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T S"]:
    """See ``api.index_scores``."""
    if k_scale is None:
        return _scores(q, k, w, visibility)
    return _forward(q.astype(jnp.float16), k, w, visibility, k_scale)


@jax.custom_vjp
def _scores(q, k, w, visibility):
    return _forward(q, k, w, visibility)


def _forward(q, k, w, visibility, k_scale=None):
    tile = _tile(_TILE, q, k)
    padded = _pad(q, k, w, visibility, tile)
    live = live_blocks(padded.visibility, *tile)
    scale = [] if k_scale is None else [pad_axis(k_scale.astype(jnp.float32), 1, tile[1])]
    (scores,) = call(
        functools.partial(_forward_kernel, tile=tile),
        [*padded, live, *scale],
        name="index_scores",
        grid=(live.shape[0] * live.shape[1], live.shape[2]),
        out_shape=[jax.ShapeDtypeStruct((q.shape[0], padded.q.shape[1], padded.k.shape[1]), jnp.float32)],
        warps=4,
        stages=2,
        cost=padded.cost(1),
    )
    return scores[:, : q.shape[1], : k.shape[1]]


def _scores_fwd(q, k, w, visibility):
    return _scores(q, k, w, visibility), (q, k, w, visibility)


def _scores_bwd(residuals, d_scores):
    q, k, w, visibility = residuals
    tile = _tile(_GRADIENT_TILE, q, k)
    padded = _pad(q, k, w, visibility, tile)
    # Once here rather than for every head there.
    d_scores = jnp.where(visibility.mask(), d_scores, 0).astype(k.dtype)
    d_scores = pad_axis(pad_axis(d_scores, 1, tile[0]), 2, tile[1])
    live = live_blocks(padded.visibility, *tile) != 0
    batch, _, heads, _ = padded.q.shape
    operands = [*padded[:3], d_scores]
    how = {"warps": 8, "stages": 3, "cost": padded.cost(2)}
    d_q, d_w = call(
        functools.partial(_query_gradients_kernel, tile=tile),
        [*operands, *span(live)],
        name="index_scores_dq",
        grid=(batch * live.shape[1], heads),
        out_shape=[
            jax.ShapeDtypeStruct(padded.q.shape, q.dtype),
            jax.ShapeDtypeStruct(padded.w.shape, jnp.float32),
        ],
        **how,
    )
    (d_k,) = call(
        functools.partial(_key_gradient_kernel, tile=tile),
        [*operands, *span(live.swapaxes(1, 2))],
        name="index_scores_dk",
        grid=(batch * live.shape[2],),
        out_shape=[jax.ShapeDtypeStruct(padded.k.shape, jnp.float32)],
        **how,
    )
    d_q = d_q[:, : q.shape[1], : q.shape[2], : q.shape[3]]
    d_k = d_k[:, : k.shape[1], : k.shape[2]]
    return d_q, d_k.astype(k.dtype), d_w[:, : w.shape[1], : w.shape[2]].astype(w.dtype), None


_scores.defvjp(_scores_fwd, _scores_bwd)


def _tile(most: tuple[int, int], q: Array, k: Array) -> tuple[int, int]:
    queries, keys = _FLOAT32_TILE if k.dtype == jnp.float32 else most
    return min(queries, power_of_two(q.shape[1])), min(keys, power_of_two(k.shape[1]))


def _pad(q: Array, k: Array, w: Array, visibility: Visibility, tile: tuple[int, int]) -> _Padded:
    """Whole tiles, and heads that are a power of two wide: what is added is zero."""
    width = power_of_two(q.shape[3])
    q, k = pad_axis(pad_axis(q, 3, width), 1, tile[0]), pad_axis(pad_axis(k, 2, width), 1, tile[1])
    w = pad_axis(w.astype(jnp.float32), 1, tile[0])
    return _Padded(q, k, w, *pad_visibility(visibility, *tile))


def _visible(query_index, query_segment, key_segment, b, queries, j, keys: int):
    key = j * keys + jnp.arange(keys)
    segment = query_segment[b, queries][:, None]
    same = segment == key_segment[b, pl.ds(j * keys, keys)][None, :]
    return (key[None, :] <= query_index[b, queries][:, None]) & same & (segment != 0)


def _forward_kernel(
    q, k, w, query_index, query_segment, key_segment, live, *scale_and_out, tile: tuple[int, int]
):
    """One tile of scores; ``k_scale`` comes with keys in e4m3 alone."""
    *scale, out = scale_and_out
    row, j, blocks = pl.program_id(0), pl.program_id(1), live.shape[1]
    b, i = row // blocks, row % blocks
    queries, keys = pl.ds(i * tile[0], tile[0]), pl.ds(j * tile[1], tile[1])
    everything = pl.ds(0, k.shape[2])
    k_t = k[b, keys, everything].astype(q.dtype).T

    def add_head(n, total):
        products = dot(q[b, queries, n, everything], k_t)
        return fma(jnp.maximum(products, 0), w[b, queries, n][:, None], total)

    heads = live[b, i, j] * q.shape[2]  # none where there is nothing to do
    total = jax.lax.fori_loop(0, heads, add_head, jnp.zeros(tile, jnp.float32))
    for of_keys in scale:
        total *= of_keys[b, keys][None, :]
    visible = _visible(query_index, query_segment, key_segment, b, queries, j, tile[1])
    out[b, queries, keys] = jnp.where(visible, total, -jnp.inf)


def _query_gradients_kernel(q, k, w, d_out, first, end, d_q, d_w, *, tile: tuple[int, int]):
    row, n, blocks = pl.program_id(0), pl.program_id(1), first.shape[1]
    b, i = row // blocks, row % blocks
    queries, everything = pl.ds(i * tile[0], tile[0]), pl.ds(0, k.shape[2])
    q_n = q[b, queries, n, everything]

    def add_keys(j, total):
        block = pl.ds(j * tile[1], tile[1])
        keys = k[b, block, everything]
        passed = jnp.where(dot(q_n, keys.T) > 0, d_out[b, queries, block], 0)
        return total + dot(passed, keys)

    start = jnp.zeros((tile[0], k.shape[2]), jnp.float32)
    total = jax.lax.fori_loop(first[b, i], end[b, i], add_keys, start)
    d_w[b, queries, n] = jnp.sum(total * q_n.astype(jnp.float32), axis=1)
    d_q[b, queries, n, everything] = (total * w[b, queries, n][:, None]).astype(d_q.dtype)


def _key_gradient_kernel(q, k, w, d_out, first, end, d_k, *, tile: tuple[int, int]):
    """Keys stand in the rows here, queries in the columns: what passed is the left factor as it comes."""
    row, blocks = pl.program_id(0), first.shape[1]
    b, j = row // blocks, row % blocks
    block, everything = pl.ds(j * tile[1], tile[1]), pl.ds(0, k.shape[2])
    keys = k[b, block, everything]

    def add_queries(i, total):
        queries = pl.ds(i * tile[0], tile[0])
        d_scores = d_out[b, queries, block].T.astype(jnp.float32)

        def add_head(n, total):
            q_n = q[b, queries, n, everything]
            passed = jnp.where(dot(keys, q_n.T) > 0, d_scores * w[b, queries, n][None, :], 0)
            return total + dot(passed.astype(keys.dtype), q_n)

        return jax.lax.fori_loop(0, q.shape[2], add_head, total)

    start = jnp.zeros((tile[1], k.shape[2]), jnp.float32)
    d_k[b, block, everything] = jax.lax.fori_loop(first[b, j], end[b, j], add_queries, start)
