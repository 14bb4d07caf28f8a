"""Decoding on GPUs.

Scores: a block of threads has one query and a span of its keys, tile after tile; all heads meet a tile and are summed
in registers. Spans past the query cost a row of -inf.

Attention: a block of threads has one query, up to 64 of its heads, and a part of its list, of which it gathers 64
keys at a time: a few sequences would not fill the machine with a list each. The parts are combined by their
log-sum-exp. In e4m3, each 128 latents of a gathered tile are scaled to bfloat16 in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import pad_axis, power_of_two, round_up
from pallas_kernels.decode.cache import E4M3, GROUP, Cache, readable, rows_of
from pallas_kernels.decode.reference import combine
from pallas_kernels.selection import in_tiles, require_list
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.softmax import LOG2_E, LOW
from pallas_kernels.sparse_mla.gpu import KEYS, tiles_of
from pallas_kernels.triton import call, dot, one_round

_HEADS = 64  # of a block, at most
_BLOCKS = 132  # of attention: one for each multiprocessor of an H100
_SCORED_KEYS = 64  # of a tile
_SPANS, _TILES = 528, 8  # spans of scores at least, as far as the keys go; tiles of a span at most


def paged_index_scores(
    q: Float[Array, "B T N J"],
    w: Float[Array, "B T N"],
    cache: Cache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
) -> Float[Array, "B T M*G"]:
    """See ``api.paged_index_scores``. Products in bfloat16, which holds e4m3 exactly: reading is what takes time."""
    batch, queries = number.shape
    size, width = cache.page_size, cache.index_key.shape[-1]
    keys = page_table.shape[1] * size
    tiles = -(-keys // _SCORED_KEYS)
    of_span = max(1, min(_TILES, batch * tiles // _SPANS))
    tiles = round_up(tiles, of_span)
    heads = power_of_two(q.shape[2])
    q = pad_axis(pad_axis(q, 3, width), 2, heads)
    if E4M3 in (q.dtype, cache.index_key.dtype):
        q = q.astype(jnp.bfloat16)
    w = pad_axis(w.astype(jnp.float32), 2, heads)
    scales = [] if cache.index_scale is None else [cache.index_scale.reshape(-1)]
    (scores,) = call(
        functools.partial(_scores_kernel, size=size, of_span=of_span, in_e4m3=bool(scales)),
        [q, w, page_table, number, cache.index_key.reshape(-1, width), *scales],
        name="paged_index_scores",
        # Queries of a sequence follow one another: what one reads, the next finds in the L2 cache.
        grid=(queries, tiles // of_span, batch),
        out_shape=[jax.ShapeDtypeStruct((batch, queries, tiles * _SCORED_KEYS), jnp.float32)],
        warps=4,
        stages=2,
        cost=pl.CostEstimate(
            flops=2 * batch * queries * heads * keys * width,
            transcendentals=0,
            bytes_accessed=batch * keys * width * cache.index_key.dtype.itemsize,
        ),
    )
    return scores[:, :, :keys]


def _scores_kernel(q, w, table, number, k, *scale_and_out, size: int, of_span: int, in_e4m3: bool):
    t, b, out = pl.program_id(0), pl.program_id(2), scale_and_out[-1]
    heads, everything = pl.ds(0, q.shape[2]), pl.ds(0, q.shape[3])
    first, last = pl.program_id(1) * of_span, number[b, t]
    live = jnp.clip((last + _SCORED_KEYS) // _SCORED_KEYS - first, 0, of_span)
    q_t, weights = q[b, t, heads, everything].T, w[b, t, heads]

    def score_tile(i, carry):
        start = (first + i) * _SCORED_KEYS
        key = start + jnp.arange(_SCORED_KEYS)
        # Behind the query the table may hold anything: its own page is read there.
        read = jnp.minimum(key, last)
        row = table[b, jax.lax.div(read, jnp.int32(size))] * size + jax.lax.rem(read, jnp.int32(size))
        products = dot(k[row, everything].astype(q.dtype), q_t)
        total = jnp.sum(jnp.maximum(products, 0) * weights[None, :], axis=1)
        if in_e4m3:
            total *= scale_and_out[0][row]
        out[b, t, pl.ds(start, _SCORED_KEYS)] = jnp.where(key <= last, total, -jnp.inf)
        return carry

    def fill_tile(i, carry):
        keys = pl.ds((first + i) * _SCORED_KEYS, _SCORED_KEYS)
        out[b, t, keys] = jnp.full((_SCORED_KEYS,), -jnp.inf, jnp.float32)
        return carry

    jax.lax.fori_loop(0, live, score_tile, jnp.int32(0))
    jax.lax.fori_loop(live, of_span, fill_tile, jnp.int32(0))


def paged_sparse_mla(
    q: Float[Array, "B T H C+R"],
    cache: Cache,
    page_table: Int[Array, "B M"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.paged_sparse_mla``."""
    require_list("paged_sparse_mla", indices)
    heads, (latent, rope) = q.shape[2], (x.shape[-1] for x in (cache.latent, cache.rope))
    parts = pad_axis(q[..., :latent_dim], 3, latent), pad_axis(q[..., latent_dim:], 3, rope)
    padded = pad_axis(jnp.concatenate(parts, axis=-1), 2, min(power_of_two(heads), _HEADS)).astype(
        cache.rope.dtype
    )
    batch, queries, all_heads, width = padded.shape
    indices, places = in_tiles(indices, KEYS)
    rows = rows_of(page_table, indices, cache.page_size)
    group = min(all_heads, _HEADS)
    blocks = batch * queries * (all_heads // group)
    splits = max(1, min(rows.shape[2] // KEYS, _BLOCKS // blocks))
    flat = [
        x.reshape(-1, x.shape[-1]) for x in (cache.latent, cache.rope, cache.latent_scale) if x is not None
    ]
    pairs = rows.size * all_heads
    o, lse = call(
        functools.partial(_attend_kernel, group=group, scale=scale, in_e4m3=cache.latent_scale is not None),
        [padded, rows, places, *flat],
        name="paged_sparse_mla",
        grid=(batch * queries, all_heads // group, splits),
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, queries, all_heads, latent), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, queries, all_heads), jnp.float32),
        ],
        warps=8,
        stages=3,
        cost=pl.CostEstimate(
            flops=2 * pairs * (width + latent),
            transcendentals=pairs,
            bytes_accessed=rows.size * (latent * cache.latent.dtype.itemsize + 2 * rope),
        ),
    )
    o, lse = (o[0], lse[0]) if splits == 1 else combine(o, lse)
    return o[:, :, :heads, :latent_dim].astype(q.dtype), lse[:, :, :heads]


def _attend_kernel(q, rows, places, latent, rope, *rest, group: int, scale: float, in_e4m3: bool):
    o, lse = rest[-2:]
    row, split, splits = pl.program_id(0), pl.program_id(2), o.shape[0]
    b, t = row // rows.shape[1], row % rows.shape[1]
    heads, (width, rope_width) = pl.ds(pl.program_id(1) * group, group), (x.shape[1] for x in (latent, rope))
    of_chunk = min(width, GROUP) if in_e4m3 else width
    chunks, ropes = width // of_chunk, pl.ds(0, rope_width)
    q_c, q_r = q[b, t, heads, pl.ds(0, width)], q[b, t, heads, pl.ds(width, rope_width)]

    def latents(keys, n):
        c = latent[keys, pl.ds(n * of_chunk, of_chunk)]
        if in_e4m3:
            c = (c.astype(jnp.float32) * rest[0][keys, n][:, None]).astype(q.dtype)
        return c

    tiles = tiles_of(places, b, t)

    def attend_tile(i, carry):
        totals, before, sums = carry
        found = rows[b, t, pl.ds(i * KEYS, KEYS)]
        is_key, keys = found >= 0, readable(found)

        def add_chunk(n, scores):
            return scores + dot(q[b, t, heads, pl.ds(n * of_chunk, of_chunk)], latents(keys, n).T)

        # In e4m3 each chunk is widened here, and below again: all four are more than the registers hold.
        whole = None if in_e4m3 else latents(keys, 0)
        r = rope[keys, ropes]
        scores = one_round(tiles, lambda x: x + dot(q_r, r.T), jnp.zeros((group, KEYS), jnp.float32))
        if whole is None:
            scores = jax.lax.fori_loop(0, chunks, add_chunk, scores)
        else:
            scores = one_round(tiles, lambda x: x + dot(q_c, whole.T), scores)
        scores = jnp.where(is_key[None, :], scores * (scale * LOG2_E), LOW)
        highest = jnp.maximum(before, jnp.max(scores, axis=1))
        p, shrink = jnp.exp2(scores - highest[:, None]), jnp.exp2(before - highest)
        narrow = p.astype(q.dtype)
        totals = tuple(
            total * shrink[:, None] + dot(narrow, latents(keys, n) if whole is None else whole)
            for n, total in enumerate(totals)
        )
        return totals, highest, sums * shrink + jnp.sum(p, axis=1)

    start = (
        tuple(jnp.zeros((group, of_chunk), jnp.float32) for _ in range(chunks)),
        jnp.full((group,), LOW / 2, jnp.float32),
        jnp.zeros((group,), jnp.float32),
    )
    part = split * tiles // splits, (split + 1) * tiles // splits
    totals, highest, sums = jax.lax.fori_loop(*part, attend_tile, start)
    divisor = jnp.where(sums > 0, sums, 1)
    for n, total in enumerate(totals):
        o[split, b, t, heads, pl.ds(n * of_chunk, of_chunk)] = total / divisor[:, None]
    lse[split, b, t, heads] = jnp.where(sums > 0, highest / LOG2_E + jnp.log(divisor), -jnp.inf)
