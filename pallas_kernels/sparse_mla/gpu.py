"""Sparse attention on GPUs: every query gathers its own keys, a tile of 64 or 128 at a time.

Forward: a block of threads has one query and up to 64 of its heads; the gathered tile serves as keys and as values.
Triton gives all keys of a tile to every warp where a product's result goes into another product, so that both
warpgroups would compute the same scores: a loop of one round hides the second product from it. Copies are not
asynchronous then, as they are in innermost loops only; what that costs is a third of what it saves.

Backward, in two kernels. The first has one query with up to 128 heads: it walks through the features of a tile in
chunks, so that copies of the next chunk run under the products of this one, leaves the gradient of the scores in
memory, and in a second walk adds the gradient of the keys to theirs with atomic additions, one a key and feature; that
one is not pipelined, so that no register is spilt. The second kernel multiplies the gradient of the scores with the
keys once more, which gives the gradient of the query.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from pallas_kernels.blocks import pad_axis, power_of_two
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import in_tiles, require_list
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.softmax import LOG2_E, LOW, output_delta, to_base_2
from pallas_kernels.triton import add_to_rows, call, dot, exp2, one_round

KEYS, _GRADIENT_KEYS = 64, 128  # of a tile
_FORWARD_HEADS, _BACKWARD_HEADS = 64, 128  # of a block, at most
_FEATURES = 64  # of a chunk


class Padded(NamedTuple):
    """The operands as the kernels read them: a latent and a rotary part that are powers of two."""

    q: Float[Array, "B T H C+R"]
    kv: Float[Array, "B S C+R"]
    indices: Int[Array, "B T K"]
    places: Int[Array, "B T"]  # of the list, up to its last key
    latent: int

    @property
    def rope(self) -> int:
        """Width of the rotary part."""
        return self.q.shape[-1] - self.latent

    def cost(self, products: int) -> pl.CostEstimate:
        """With full lists; ``products`` is the sum of the widths that meet each (query, head, key)."""
        pairs = self.indices.size * self.q.shape[2]
        gathered = self.indices.size * self.kv.shape[2] * self.kv.dtype.itemsize
        return pl.CostEstimate(flops=2 * products * pairs, transcendentals=pairs, bytes_accessed=gathered)


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.sparse_mla``."""
    require_list("sparse_mla", indices)
    return _attend(q, kv, indices, latent_dim, scale)


def _gradient_keys(dtype) -> int:
    """Of a tile in the first backward kernel: half as many of float32, whose products want registers for both sides."""
    return KEYS if dtype == jnp.float32 else _GRADIENT_KEYS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q, kv, indices, latent_dim, scale):
    return _forward(q, kv, indices, latent_dim, scale)


def _attend_fwd(q, kv, indices, latent_dim, scale):
    o, lse = _forward(q, kv, indices, latent_dim, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, kv, indices, o, lse)


def pad(q: Array, kv: Array, indices: Array, latent_dim: int, tile: int = KEYS) -> Padded:
    """Whole tiles of so many keys; heads, latent and rotary part as powers of two. What is added is zero, no key."""
    latent, rope = power_of_two(latent_dim), power_of_two(q.shape[-1] - latent_dim)

    def features(x):
        c, r = x[..., :latent_dim], x[..., latent_dim:]
        return jnp.concatenate([pad_axis(c, -1, latent), pad_axis(r, -1, rope)], axis=-1)

    if (latent, rope) != (latent_dim, q.shape[-1] - latent_dim):
        q, kv = features(q), features(kv)
    return Padded(pad_heads(q), kv, *in_tiles(indices, tile), latent)


def pad_heads(x: Array) -> Array:
    """[B, T, H, ...] with a power of two of heads, or a multiple of the largest block."""
    return pad_axis(x, 2, min(power_of_two(x.shape[2]), _BACKWARD_HEADS))


def _forward(q, kv, indices, latent_dim, scale):
    padded = pad(q, kv, indices, latent_dim)
    batch, queries, heads, _ = padded.q.shape
    group = min(heads, _FORWARD_HEADS)
    o, lse = call(
        functools.partial(_forward_kernel, group=group, latent=padded.latent, rope=padded.rope, scale=scale),
        padded[:4],
        name="sparse_mla",
        grid=(batch * queries, heads // group),
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads, padded.latent), kv.dtype),
            jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
        ],
        warps=8,
        stages=1,
        cost=padded.cost(2 * padded.latent + padded.rope),
    )
    return o[:, :, : q.shape[2], :latent_dim], lse[:, :, : q.shape[2]]


def query_of(queries: int, group: int):
    """Batch, query and heads of a block of threads."""
    row = pl.program_id(0)
    return row // queries, row % queries, pl.ds(pl.program_id(1) * group, group)


def tile_of(indices, b, t, i, size: int = KEYS):
    """Places of a tile in the list, which of them hold a key, and the keys; 0 where there is none."""
    places = pl.ds(i * size, size)
    keys = indices[b, t, places]
    return places, keys >= 0, jnp.maximum(keys, 0)


def tiles_of(places, b, t, size: int = KEYS):
    """How many tiles a query's list has."""
    return (places[b, t] + size - 1) // size


def _forward_kernel(q, kv, indices, places, o, lse, *, group: int, latent: int, rope: int, scale: float):
    b, t, heads = query_of(indices.shape[1], group)
    latents, ropes = pl.ds(0, latent), pl.ds(latent, rope)
    q_c, q_r, factor = q[b, t, heads, latents], q[b, t, heads, ropes], scale * LOG2_E
    tiles = tiles_of(places, b, t)

    def attend_tile(i, carry):
        total, before, sums = carry
        _, is_key, keys = tile_of(indices, b, t, i)
        c, r = kv[b, keys, latents], kv[b, keys, ropes]
        scores = one_round(tiles, lambda x: x + dot(q_c, c.T), jnp.zeros((group, KEYS), jnp.float32))
        scores = one_round(tiles, lambda x: x + dot(q_r, r.T), scores)
        scores = jnp.where(is_key[None, :], scores, LOW)
        highest = jnp.maximum(before, jnp.max(scores, axis=1) * factor)
        p, shrink = exp2(scores, factor, -highest[:, None]), jnp.exp2(before - highest)
        total = total * shrink[:, None] + dot(p.astype(c.dtype), c)
        return total, highest, sums * shrink + jnp.sum(p, axis=1)

    start = (
        jnp.zeros((group, latent), jnp.float32),
        jnp.full((group,), LOW / 2 * factor, jnp.float32),
        jnp.zeros((group,), jnp.float32),
    )
    total, highest, sums = jax.lax.fori_loop(0, tiles, attend_tile, start)
    divisor = jnp.where(sums > 0, sums, 1)
    o[b, t, heads, latents] = (total / divisor[:, None]).astype(o.dtype)
    lse[b, t, heads] = jnp.where(sums > 0, highest / LOG2_E + jnp.log(divisor), -jnp.inf)


def _attend_bwd(latent_dim, scale, residuals, gradients):
    q, kv, indices, o, lse = residuals
    d_o, d_lse = gradients
    padded = pad(q, kv, indices, latent_dim, _gradient_keys(kv.dtype))
    batch, queries, heads, width = padded.q.shape
    delta = output_delta(o, d_o, d_lse)
    lse = to_base_2(lse)
    d_o = pad_heads(pad_axis(d_o.astype(kv.dtype), 3, padded.latent))
    group = min(heads, _BACKWARD_HEADS)
    grid = batch * queries, heads // group
    sizes = {"group": group, "latent": padded.latent, "rope": padded.rope}
    d_scores, d_kv = call(
        functools.partial(_key_gradient_kernel, **sizes, scale=scale),
        [*padded[:4], d_o, pad_heads(lse), pad_heads(delta), jnp.zeros(padded.kv.shape, jnp.float32)],
        name="sparse_mla_dkv",
        grid=grid,
        out_shape=[
            jax.ShapeDtypeStruct((*padded.indices.shape, heads), kv.dtype),
            jax.ShapeDtypeStruct(padded.kv.shape, jnp.float32),
        ],
        warps=8,
        stages=2,
        aliases={7: 1},
        cost=padded.cost(2 * width + 2 * padded.latent),
    )
    group = min(heads, _FORWARD_HEADS)
    (d_q,) = call(
        functools.partial(_query_gradient_kernel, **sizes | {"group": group}),
        [d_scores, *padded[1:4]],
        name="sparse_mla_dq",
        grid=(batch * queries, heads // group),
        out_shape=[jax.ShapeDtypeStruct(padded.q.shape, q.dtype)],
        warps=8,
        stages=3,
        cost=padded.cost(width),
    )
    rope = q.shape[-1] - latent_dim

    def features(x):
        return jnp.concatenate([x[..., :latent_dim], x[..., padded.latent : padded.latent + rope]], axis=-1)

    return features(d_q)[:, :, : q.shape[2]], features(d_kv).astype(kv.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _key_gradient_kernel(
    q,
    kv,
    indices,
    places,
    d_o,
    lse,
    delta,
    _zeros,
    d_scores_out,
    d_kv,
    *,
    group: int,
    latent: int,
    rope: int,
    scale: float,
):
    """Keys stand in the rows here, heads in the columns: the gradient of the scores is the left factor as it comes."""
    b, t, heads = query_of(indices.shape[1], group)
    ropes, width, size = pl.ds(latent, rope), min(latent, _FEATURES), _gradient_keys(kv.dtype)
    tiles = tiles_of(places, b, t, size)

    def differentiate_tile(i, carry):
        where, is_key, keys = tile_of(indices, b, t, i, size)

        def add_chunk(c, sums):
            features = pl.ds(c * width, width)
            latents = kv[b, keys, features]
            scores = sums[0] + dot(latents, q[b, t, heads, features].T)
            return scores, sums[1] + dot(latents, d_o[b, t, heads, features].T)

        start = dot(kv[b, keys, ropes], q[b, t, heads, ropes].T), jnp.zeros((size, group), jnp.float32)
        scores, d_p = jax.lax.fori_loop(0, latent // width, add_chunk, start)
        p = exp2(scores, scale * LOG2_E, -lse[b, t, heads][None, :])
        p = jnp.where(is_key[:, None], p, 0)
        d_scores = (p * (d_p - delta[b, t, heads][None, :]) * scale).astype(kv.dtype)
        p = p.astype(kv.dtype)
        d_scores_out[b, t, where, heads] = d_scores
        _, _, keys = tile_of(indices, b, t, i, size)  # read again, not kept in registers meanwhile

        def give_chunk(c, carry):
            features = pl.ds(c * width, width)

            def add_products(total):
                return total + dot(d_scores, q[b, t, heads, features]) + dot(p, d_o[b, t, heads, features])

            zeros = jnp.zeros((size, width), jnp.float32)
            add_to_rows(d_kv, b, keys, features, one_round(tiles, add_products, zeros))
            return carry

        jax.lax.fori_loop(0, latent // width, give_chunk, carry)
        add_to_rows(d_kv, b, keys, ropes, dot(d_scores, q[b, t, heads, ropes]))
        return carry

    jax.lax.fori_loop(0, tiles, differentiate_tile, jnp.int32(0))


def _query_gradient_kernel(d_scores, kv, indices, places, d_q, *, group: int, latent: int, rope: int):
    b, t, heads = query_of(indices.shape[1], group)
    latents, ropes = pl.ds(0, latent), pl.ds(latent, rope)

    def add_tile(i, sums):
        where, _, keys = tile_of(indices, b, t, i)
        weights = d_scores[b, t, where, heads].T
        return sums[0] + dot(weights, kv[b, keys, latents]), sums[1] + dot(weights, kv[b, keys, ropes])

    start = jnp.zeros((group, latent), jnp.float32), jnp.zeros((group, rope), jnp.float32)
    d_c, d_r = jax.lax.fori_loop(0, tiles_of(places, b, t), add_tile, start)
    d_q[b, t, heads, latents] = d_c.astype(d_q.dtype)
    d_q[b, t, heads, ropes] = d_r.astype(d_q.dtype)
