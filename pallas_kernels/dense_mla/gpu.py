"""Masked multi-head attention on GPUs: flash attention under a mask of one bit a pair.

Forward: a block of threads has a head and a block of queries and walks through the keys with a running maximum.
Backward: one kernel for dq in the same order, and one in which a block of keys walks through the queries, for dk and
dv; both with the probabilities from the log-sum-exp. Limits and selection come as one packed mask, turned so that the
rows of a kernel's tiles read its words. Blocks before the first and behind the last with a bit in it are left out.

cuDNN's attention (``jax.nn.dot_product_attention``) does not do: it wants the mask as a bfloat16 bias, 16 times as
much to read, and computes a gradient of it. With it a query without keys gets the mean of the values, the log-sum-exp
passes no gradient on, and float32 is refused.
"""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from pallas_kernels.blocks import LEAST, pad_axis, power_of_two, span
from pallas_kernels.platform import UnsupportedError
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import BITS, pack_mask, require_mask
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.softmax import LOG2_E, LOW, output_delta, to_base_2
from pallas_kernels.triton import call, dot, exp2, parts
from pallas_kernels.visibility import Visibility

# Rows of a tile and what they walk through, at most, for heads that are at most so wide: the sums for dk and dv of 128
# keys take 160 of a thread's 255 registers.
_TILE, _WIDTHS = (128, 64), 320


class Mask(NamedTuple):
    """Who belongs to whom, as rows of tiles read it: queries that walk through keys, or keys through queries."""

    words: Int[Array, "B W R"]  # bit n % 32 of words[b, n // 32, r]: row r and column n belong together
    first: Int[Array, "B I"]  # for each block of rows, the first block of columns with any bit
    end: Int[Array, "B I"]  # the one behind the last


class _Operands(NamedTuple):
    """Whole tiles, and widths that are multiples of what a product takes: what is added is zero."""

    q: Float[Array, "B H T Q"]
    k: Float[Array, "B H S Q"]
    v: Float[Array, "B H S V"]

    def cost(self, features: int) -> pl.CostEstimate:
        """As if everybody saw everybody; ``features`` is the sum of the products' inner or outer widths."""
        batch, heads, queries, width = self.q.shape
        pairs = batch * heads * queries * self.k.shape[2]
        rows = batch * heads * (queries + self.k.shape[2])
        memory = rows * (width + self.v.shape[3]) * self.k.dtype.itemsize
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
    _check_widths(q, v)
    return _attend(q, k, v, attended_words(q, k, visibility, selected), scale)


def _check_widths(q: Array, v: Array) -> None:
    if q.shape[3] + v.shape[3] > _WIDTHS:
        raise UnsupportedError(
            f"dense_mla: the heads of q and v are {q.shape[3]} and {v.shape[3]} wide, and the GPU kernel's registers "
            f'hold {_WIDTHS} together: use implementation="reference"'
        )


def attended_words(
    q: Array, k: Array, visibility: Visibility, selected: Array | None
) -> UInt32[Array, "B W S"]:
    """The packed mask of the keys [B, H, S, Q] that queries [B, H, T, Q] attend to."""
    if selected is None:
        return pack_mask(visibility.mask())
    require_mask("masked attention", selected, q.shape[2], k.shape[2])
    return selected


def rows_of_queries(words: UInt32[Array, "B W S"], tile: tuple[int, int]) -> Mask:
    """The mask for tiles of queries × keys, in which each query finds the bits of 32 keys in one word."""
    batch, blocks, _ = words.shape
    words = pad_axis(words, 2, BITS).reshape(batch, blocks, -1, BITS)
    words = words.transpose(0, 2, 3, 1)[..., None]  # 32 keys along axis 2, a word's queries along the last
    place = jnp.arange(BITS, dtype=jnp.uint32)
    bits = (words >> place & 1) << place[:, None, None]
    return rows_of_keys(jnp.sum(bits, axis=2, dtype=jnp.uint32).reshape(batch, -1, blocks * BITS), tile)


def rows_of_keys(words: UInt32[Array, "B W R"], tile: tuple[int, int]) -> Mask:
    """The mask for tiles of keys × queries, in which each key finds the bits of 32 queries in one word."""
    rows, columns = tile
    words = pad_axis(pad_axis(words, 1, columns // BITS), 2, rows)
    blocks = words.reshape(words.shape[0], -1, columns // BITS, words.shape[2] // rows, rows)
    live = jnp.any(blocks != 0, axis=(2, 4)).swapaxes(1, 2)
    return Mask(jax.lax.bitcast_convert_type(words, jnp.int32), *span(live))


def belongs(words, b: Array, rows, j: Array, columns: int) -> Bool[Array, "R C"]:
    """True where a row and a column of block j belong together: in the kernel, from ``Mask.words``."""
    column, groups = jnp.arange(columns), columns // BITS
    found = words[b, j * groups, rows][:, None]
    for group in range(1, groups):  # which of them a column reads the compiler knows
        found = jnp.where(
            (column >= group * BITS)[None, :], words[b, j * groups + group, rows][:, None], found
        )
    return (found & (1 << column % BITS)[None, :]) != 0


def tile_sizes(most: tuple[int, int], rows: int, columns: int, dtype) -> tuple[int, int]:
    """Rows and columns of a tile, whole words of each; few of float32, whose products want registers for both sides."""
    if dtype == jnp.float32:
        return BITS, BITS
    of_rows, of_columns = (max(BITS, power_of_two(n)) for n in (rows, columns))
    return min(most[0], of_rows), min(most[1], of_columns)


def _pad(q, k, v, queries: int, keys: int) -> _Operands:
    """With lengths that are multiples of tiles of so many queries and keys."""
    q, k, v = (pad_axis(x, 3, LEAST) for x in (q, k, v))
    return _Operands(pad_axis(q, 2, queries), pad_axis(k, 2, keys), pad_axis(v, 2, keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, words, scale):
    return _forward(q, k, v, words, scale)


def _attend_fwd(q, k, v, words, scale):
    o, lse = _forward(q, k, v, words, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, k, v, words, o, lse)


def _forward(q, k, v, words, scale):
    tile = tile_sizes(_TILE, q.shape[2], k.shape[2], k.dtype)
    padded = _pad(q, k, v, *tile)
    batch, heads, queries, width = padded.q.shape
    values = padded.v.shape[3]
    o, lse = call(
        functools.partial(_forward_kernel, tile=tile, scale=scale),
        [*rows_of_queries(words, tile), *padded],
        name="dense_mla",
        grid=(queries // tile[0], batch * heads),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, queries, values), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        warps=8,
        stages=3,
        cost=padded.cost(width + values),
    )
    return o[:, :, : q.shape[2], : v.shape[3]], lse[:, :, : q.shape[2]]


def _block(heads: int, size: int):
    """Batch, head, number of the block of rows and its rows; the longest walks, those of the last, come first."""
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    return pl.program_id(1) // heads, pl.program_id(1) % heads, i, pl.ds(i * size, size)


def products(left: Iterable[Array], right: Iterable[Array]) -> Array:
    """``left · rightᵀ`` over the parts of their width."""
    return functools.reduce(operator.add, (dot(a, b.T) for a, b in zip(left, right, strict=True)))


def _forward_kernel(words, first, end, q, k, v, o, lse, *, tile: tuple[int, int], scale: float):
    b, h, i, queries = _block(q.shape[1], tile[0])
    widths, values = parts(q.shape[3]), parts(v.shape[3])
    q_parts, factor = [q[b, h, queries, part] for part in widths], scale * LOG2_E

    def attend_tile(j, carry):
        totals, before, sums = carry
        keys = pl.ds(j * tile[1], tile[1])
        scores = products(q_parts, [k[b, h, keys, part] for part in widths])
        scores = jnp.where(belongs(words, b, queries, j, tile[1]), scores, LOW)
        highest = jnp.maximum(before, jnp.max(scores, axis=1) * factor)
        p = exp2(scores, factor, -highest[:, None])
        shrink = jnp.exp2(before - highest)
        weights = p.astype(v.dtype)
        totals = [
            total * shrink[:, None] + dot(weights, v[b, h, keys, part])
            for total, part in zip(totals, values, strict=True)
        ]
        return totals, highest, sums * shrink + jnp.sum(p, axis=1)

    start = (
        [jnp.zeros((tile[0], part.size), jnp.float32) for part in values],
        jnp.full((tile[0],), LOW / 2 * factor, jnp.float32),
        jnp.zeros((tile[0],), jnp.float32),
    )
    totals, highest, sums = jax.lax.fori_loop(first[b, i], end[b, i], attend_tile, start)
    divisor = jnp.where(sums > 0, sums, 1)
    for total, part in zip(totals, values, strict=True):
        o[b, h, queries, part] = (total / divisor[:, None]).astype(o.dtype)
    lse[b, h, queries] = jnp.where(sums > 0, highest / LOG2_E + jnp.log(divisor), -jnp.inf)


def _attend_bwd(scale, residuals, gradients):
    q, k, v, words, o, lse = residuals
    d_o, d_lse = gradients
    delta = output_delta(o, d_o, d_lse)
    statistics = jnp.stack([-to_base_2(lse), delta], axis=2)
    operands = q, k, v, words, d_o.astype(v.dtype), statistics, scale
    return _query_gradient(*operands), *_key_gradients(*operands), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _query_gradient(q, k, v, words, d_o, statistics, scale) -> Array:
    tile = tile_sizes(_TILE, q.shape[2], k.shape[2], k.dtype)
    padded = _pad(q, k, v, *tile)
    batch, heads, queries, width = padded.q.shape
    (d_q,) = call(
        functools.partial(_query_gradient_kernel, tile=tile, scale=scale),
        [*rows_of_queries(words, tile), *padded, *_pad_of_queries(d_o, statistics, tile[0])],
        name="dense_mla_dq",
        grid=(queries // tile[0], batch * heads),
        out_shape=[jax.ShapeDtypeStruct(padded.q.shape, q.dtype)],
        warps=8,
        stages=3,
        cost=padded.cost(2 * width + padded.v.shape[3]),
    )
    return d_q[:, :, : q.shape[2], : q.shape[3]]


def _pad_of_queries(d_o, statistics, queries: int) -> tuple[Array, Array]:
    """Gradient of the output, and of each row the negative of the log-sum-exp and delta, for whole tiles."""
    return pad_axis(pad_axis(d_o, 2, queries), 3, LEAST), pad_axis(statistics, 3, queries)


def _query_gradient_kernel(
    words, first, end, q, k, v, d_o, statistics, d_q, *, tile: tuple[int, int], scale: float
):
    b, h, i, queries = _block(q.shape[1], tile[0])
    widths, values = parts(q.shape[3]), parts(v.shape[3])
    q_parts = [q[b, h, queries, part] for part in widths]
    d_o_parts = [d_o[b, h, queries, part] for part in values]
    minus_lse, delta = (statistics[b, h, n, queries][:, None] for n in range(2))

    def add_tile(j, sums):
        keys = pl.ds(j * tile[1], tile[1])
        k_parts = [k[b, h, keys, part] for part in widths]
        p = exp2(products(q_parts, k_parts), scale * LOG2_E, minus_lse)
        p = jnp.where(belongs(words, b, queries, j, tile[1]), p, 0)
        d_p = products(d_o_parts, [v[b, h, keys, part] for part in values])
        d_scores = (p * (d_p - delta)).astype(k.dtype)
        return [total + dot(d_scores, part) for total, part in zip(sums, k_parts, strict=True)]

    start = [jnp.zeros((tile[0], part.size), jnp.float32) for part in widths]
    sums = jax.lax.fori_loop(first[b, i], end[b, i], add_tile, start)
    for total, part in zip(sums, widths, strict=True):
        d_q[b, h, queries, part] = (total * scale).astype(d_q.dtype)


def _key_gradients(q, k, v, words, d_o, statistics, scale) -> tuple[Array, Array]:
    tile = tile_sizes(_TILE, k.shape[2], q.shape[2], k.dtype)
    padded = _pad(q, k, v, tile[1], tile[0])
    batch, heads, keys, width = padded.k.shape
    d_k, d_v = call(
        functools.partial(_key_gradients_kernel, tile=tile, scale=scale),
        [*rows_of_keys(words, tile), *padded, *_pad_of_queries(d_o, statistics, tile[1])],
        name="dense_mla_dkv",
        grid=(keys // tile[0], batch * heads),
        # A place among the blocks is no place among the keys: the compiler would keep those through the loop.
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, keys // tile[0], tile[0], x.shape[3]), x.dtype)
            for x in (padded.k, padded.v)
        ],
        warps=8,
        stages=3,
        cost=padded.cost(2 * width + 2 * padded.v.shape[3]),
    )
    d_k, d_v = (x.reshape(batch, heads, keys, -1) for x in (d_k, d_v))
    return d_k[:, :, : k.shape[2], : k.shape[3]], d_v[:, :, : v.shape[2], : v.shape[3]]


def _key_gradients_kernel(
    words, first, end, q, k, v, d_o, statistics, d_k, d_v, *, tile: tuple[int, int], scale: float
):
    """Keys stand in the rows here: probabilities and their gradient are the left factors as they come."""
    b, h, j, keys = _block(q.shape[1], tile[0])
    widths, values = parts(q.shape[3]), parts(v.shape[3])
    k_parts, v_parts = [k[b, h, keys, part] for part in widths], [v[b, h, keys, part] for part in values]

    def add_tile(i, sums):
        k_sums, v_sums = sums
        queries = pl.ds(i * tile[1], tile[1])
        q_parts = [q[b, h, queries, part] for part in widths]
        d_o_parts = [d_o[b, h, queries, part] for part in values]
        p = exp2(products(k_parts, q_parts), scale * LOG2_E, statistics[b, h, 0, queries][None, :])
        p = jnp.where(belongs(words, b, keys, i, tile[1]), p, 0)
        d_scores = p * (products(v_parts, d_o_parts) - statistics[b, h, 1, queries][None, :])
        weights, d_scores = p.astype(d_o.dtype), d_scores.astype(q.dtype)
        k_sums = [total + dot(d_scores, part) for total, part in zip(k_sums, q_parts, strict=True)]
        v_sums = [total + dot(weights, part) for total, part in zip(v_sums, d_o_parts, strict=True)]
        return [k_sums, v_sums]

    start = [[jnp.zeros((tile[0], part.size), jnp.float32) for part in x] for x in (widths, values)]
    k_sums, v_sums = jax.lax.fori_loop(first[b, j], end[b, j], add_tile, start)
    for total, part in zip(k_sums, widths, strict=True):
        d_k[b, h, j, pl.ds(0, tile[0]), part] = (total * scale).astype(d_k.dtype)
    for total, part in zip(v_sums, values, strict=True):
        d_v[b, h, j, pl.ds(0, tile[0]), part] = total.astype(d_v.dtype)
