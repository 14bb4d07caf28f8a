"""The contract of decoding, in plain jnp: only pages in use are scored, only what was selected is gathered."""

import jax
import jax.numpy as jnp

from pallas_kernels.accumulate import einsum, wide
from pallas_kernels.blocks import pad_axis
from pallas_kernels.decode.cache import E4M3, Cache, dequantise_latent, readable, rows_of
from pallas_kernels.indexer.reference import index_scores
from pallas_kernels.selection import in_tiles, require_list
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.softmax import sum_exp
from pallas_kernels.visibility import Visibility

_KEYS = 1024  # scored at a time, in whole pages
_PLACES = 512  # of a list, attended at a time


def paged_index_scores(
    q: Float[Array, "B T N J"],
    w: Float[Array, "B T N"],
    cache: Cache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
) -> Float[Array, "B T M*G"]:
    """See ``api.paged_index_scores``. A few pages of every sequence at a time, up to the last that one has in use."""
    batch, queries = number.shape
    pages, size = page_table.shape[1], cache.page_size
    of_block = max(1, min(pages, _KEYS // size))
    table, keys = pad_axis(jnp.maximum(page_table, 0), 1, of_block), of_block * size
    dtype = jnp.float32 if E4M3 in (q.dtype, cache.index_key.dtype) else q.dtype
    q = q.astype(dtype)
    scores = jnp.full((batch, queries, table.shape[1] * size), -jnp.inf, wide(dtype))

    def add_block(i, scores):
        block = jax.lax.dynamic_slice_in_dim(table, i * of_block, of_block, axis=1)
        k = cache.index_key[block].reshape(batch, keys, -1)[..., : q.shape[-1]].astype(dtype)
        ones = jnp.ones((batch, keys), number.dtype)
        found = index_scores(q, k, w, Visibility(number - i * keys, jnp.ones_like(number), ones))
        if cache.index_scale is not None:
            scale = cache.index_scale[block].reshape(batch, 1, keys)
            found = jnp.where(found > -jnp.inf, found * scale, found)  # of no token it may be anything
        return jax.lax.dynamic_update_slice_in_dim(scores, found, i * keys, axis=2)

    blocks = jnp.max(number) // keys + 1
    return jax.lax.fori_loop(0, blocks, add_block, scores)[..., : pages * size]


def paged_sparse_mla(
    q: Float[Array, "B T H C+R"],
    cache: Cache,
    page_table: Int[Array, "B M"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.paged_sparse_mla``. One query after another, a tile of its list at a time, as far as the list goes."""
    require_list("paged_sparse_mla", indices)
    tile = min(_PLACES, indices.shape[2])
    indices, places = in_tiles(indices, tile)
    rows, tiles = rows_of(page_table, indices, cache.page_size), -(-places // tile)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cache)

    def attend(query):
        q, rows, tiles = query

        def attend_tile(i, carry):
            return _attend_tile(q, flat, jax.lax.dynamic_slice_in_dim(rows, i * tile, tile), carry, scale)

        start = (
            jnp.zeros((q.shape[0], latent_dim), wide(q.dtype)),
            jnp.full(q.shape[:1], -jnp.inf, wide(q.dtype)),
        )
        return jax.lax.fori_loop(0, tiles, attend_tile, start)

    queries = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (q, rows, tiles))
    o, lse = jax.lax.map(attend, queries)
    return o.reshape(*q.shape[:3], latent_dim).astype(q.dtype), lse.reshape(q.shape[:3]).astype(jnp.float32)


def _attend_tile(q: Array, flat: Cache, rows: Array, carry: tuple[Array, Array], scale: float):
    """Output [H, C] and log-sum-exp [H] with a tile's keys in them."""
    o, lse = carry
    latent_dim, read = o.shape[1], readable(rows)
    latent = flat.latent[read]
    if flat.latent_scale is not None:
        latent = dequantise_latent(latent, flat.latent_scale[read])
    latent, rope = latent[:, :latent_dim].astype(q.dtype), flat.rope[read].astype(q.dtype)
    q_c, q_r = q[:, :latent_dim], q[:, latent_dim:]
    scores = einsum("hc,kc->hk", q_c, latent) + einsum("hr,kr->hk", q_r, rope[:, : q_r.shape[1]])
    exponentials, total, tile_lse = sum_exp(jnp.where(rows >= 0, scores * scale, -jnp.inf))
    tile_o = einsum("hk,kc->hc", exponentials.astype(q.dtype), latent) / total[:, None]
    return combine(jnp.stack([o, tile_o]), jnp.stack([lse, tile_lse]))


def combine(o: Float[Array, "L *B C"], lse: Float[Array, "L *B"]) -> tuple[Array, Array]:
    """Attention to the union of what the parts attended to, which have no key in common."""
    weights, total, whole = sum_exp(jnp.moveaxis(lse, 0, -1))
    share = jnp.moveaxis(weights / total[..., None], -1, 0)
    return jnp.sum(o * share[..., None], axis=0), whole
