"""The indexer's loss of sparse training on GPUs: every query gathers its own keys, a tile of 64 at a time.

One kernel sums the attention of all heads over each listed key, one computes the index scores of the list, and one
their gradient, which is added to the index keys' with atomic additions. The divergence over [T, K] numbers is left to
XLA.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import pad_axis, power_of_two
from pallas_kernels.indexer_loss.reference import kl_rows
from pallas_kernels.selection import require_list
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.softmax import LOG2_E, LOW, to_base_2
from pallas_kernels.sparse_mla.gpu import KEYS, Padded, pad, pad_heads, query_of, tile_of, tiles_of
from pallas_kernels.triton import add_to_rows, call, dot, exp2

_HEADS, _FEATURES = 128, 64  # at a time


def sparse_indexer_loss(
    index_q: Float[Array, "B T N J"],
    index_k: Float[Array, "B S J"],
    index_w: Float[Array, "B T N"],
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    lse: Float[Array, "B T H"],
    indices: Int[Array, "B T K"],
    *,
    scale: float,
) -> Float[Array, "B T"]:
    """See ``api.sparse_indexer_loss``."""
    require_list("sparse_indexer_loss", indices)
    places = indices.shape[2]
    # Nothing here tells latent from rotary part: any cut into two powers of two does.
    width = q.shape[-1]
    cut = width - _FEATURES if width > _FEATURES else width // 2
    padded = pad(*jax.lax.stop_gradient((q, kv)), indices, cut)
    target = _target(padded, jax.lax.stop_gradient(lse), q.shape[2], scale)
    scores = _listed_scores(index_q, index_k, index_w, padded.indices, padded.places)
    return kl_rows(target[..., :places], scores[..., :places], indices >= 0)


def _target(padded: Padded, lse: Array, heads: int, scale: float) -> Float[Array, "B T K"]:
    """The attention of all heads to each listed key, averaged."""
    lse = to_base_2(lse, -LOW)
    missing = padded.q.shape[2] - heads
    lse = jnp.pad(lse, [(0, 0), (0, 0), (0, missing)], constant_values=-LOW)
    batch, queries, *_ = padded.q.shape
    (total,) = call(
        functools.partial(_target_kernel, latent=padded.latent, rope=padded.rope, scale=scale),
        [*padded[:4], lse],
        name="indexer_loss_target",
        grid=(batch * queries, 1),
        out_shape=[jax.ShapeDtypeStruct(padded.indices.shape, jnp.float32)],
        warps=4,
        stages=3,
        cost=padded.cost(padded.q.shape[3]),
    )
    # Tiles behind the last key of a list are not written: what lies there may not even be a number.
    return jnp.where(padded.indices >= 0, total / heads, 0)


def _target_kernel(q, kv, indices, places, lse, out, *, latent: int, rope: int, scale: float):
    group = min(q.shape[2], _HEADS)
    b, t, _ = query_of(indices.shape[1], group)
    ropes, width = pl.ds(latent, rope), min(latent, _FEATURES)

    def add_tile(i, carry):
        where, is_key, keys = tile_of(indices, b, t, i)

        def add_heads(h, total):
            heads = pl.ds(h * group, group)

            def add_chunk(c, scores):
                features = pl.ds(c * width, width)
                return scores + dot(kv[b, keys, features], q[b, t, heads, features].T)

            start = dot(kv[b, keys, ropes], q[b, t, heads, ropes].T)
            scores = jax.lax.fori_loop(0, latent // width, add_chunk, start)
            p = exp2(scores, scale * LOG2_E, -lse[b, t, heads][None, :])
            return total + jnp.sum(jnp.where(is_key[:, None], p, 0), axis=1)

        out[b, t, where] = jax.lax.fori_loop(
            0, q.shape[2] // group, add_heads, jnp.zeros((KEYS,), jnp.float32)
        )
        return carry

    jax.lax.fori_loop(0, tiles_of(places, b, t), add_tile, jnp.int32(0))


class _Index(NamedTuple):
    """The indexer's operands as the kernels read them: powers of two."""

    q: Float[Array, "B T N J"]
    k: Float[Array, "B S J"]
    w: Float[Array, "B T N"]

    def cost(self, indices: Array, products: int) -> pl.CostEstimate:
        """With full lists."""
        pairs, (heads, width) = indices.size, self.q.shape[2:]
        gathered = pairs * width * self.k.dtype.itemsize
        return pl.CostEstimate(
            flops=2 * products * pairs * heads * width, transcendentals=0, bytes_accessed=gathered
        )


def _pad_index(q: Array, k: Array, w: Array) -> _Index:
    width = power_of_two(q.shape[3])
    return _Index(pad_heads(pad_axis(q, 3, width)), pad_axis(k, 2, width), pad_heads(w.astype(jnp.float32)))


@jax.custom_vjp
def _listed_scores(q, k, w, indices, places):
    index = _pad_index(q, k, w)
    batch, queries, *_ = index.q.shape
    (scores,) = call(
        _scores_kernel,
        [*index, indices, places],
        name="listed_index_scores",
        grid=(batch * queries, 1),
        out_shape=[jax.ShapeDtypeStruct(indices.shape, jnp.float32)],
        warps=4,
        stages=3,
        cost=index.cost(indices, 1),
    )
    return scores


def _listed_scores_fwd(q, k, w, indices, places):
    return _listed_scores(q, k, w, indices, places), (q, k, w, indices, places)


def _products(q, k, b, t, keys):
    """[K, N] products of a tile's keys with the index heads of a query, and both factors."""
    everything = pl.ds(0, k.shape[2])
    q_t, tile = q[b, t, pl.ds(0, q.shape[2]), everything], k[b, keys, everything]
    return dot(tile, q_t.T), q_t, tile


def _scores_kernel(q, k, w, indices, places, out):
    b, t, heads = query_of(indices.shape[1], q.shape[2])
    weights = w[b, t, heads]

    def add_tile(i, carry):
        where, _, keys = tile_of(indices, b, t, i)
        products, _, _ = _products(q, k, b, t, keys)
        out[b, t, where] = jnp.sum(jnp.maximum(products, 0) * weights[None, :], axis=1)
        return carry

    jax.lax.fori_loop(0, tiles_of(places, b, t), add_tile, jnp.int32(0))


def _listed_scores_bwd(residuals, d_scores):
    q, k, w, indices, places = residuals
    index = _pad_index(q, k, w)
    batch, queries, *_ = index.q.shape
    d_raw, d_k = call(
        _gradients_kernel,
        [
            *index,
            indices,
            places,
            jnp.where(indices >= 0, d_scores, 0),
            jnp.zeros(index.k.shape, jnp.float32),
        ],
        name="listed_index_scores_backward",
        grid=(batch * queries, 1),
        out_shape=[
            jax.ShapeDtypeStruct(index.q.shape, jnp.float32),
            jax.ShapeDtypeStruct(index.k.shape, jnp.float32),
        ],
        warps=4,
        stages=3,
        aliases={6: 1},
        cost=index.cost(indices, 3),
    )
    d_raw = d_raw[:, :, : q.shape[2], : q.shape[3]]
    d_q = d_raw * w.astype(jnp.float32)[..., None]
    d_w = jnp.sum(d_raw * q.astype(jnp.float32), axis=-1)
    return d_q.astype(q.dtype), d_k[..., : k.shape[2]].astype(k.dtype), d_w.astype(w.dtype), None, None


_listed_scores.defvjp(_listed_scores_fwd, _listed_scores_bwd)


def _gradients_kernel(q, k, w, indices, places, d_scores, _zeros, d_raw, d_k):
    """``d_raw`` is the gradient of ``w q``: that of q is w times it, that of w is q times it."""
    b, t, heads = query_of(indices.shape[1], q.shape[2])
    everything = pl.ds(0, k.shape[2])

    def add_tile(i, total):
        where, _, keys = tile_of(indices, b, t, i)
        products, q_t, tile = _products(q, k, b, t, keys)
        passed = jnp.where(products > 0, d_scores[b, t, where][:, None], 0).astype(k.dtype)
        weighted = (q_t.astype(jnp.float32) * w[b, t, heads][:, None]).astype(k.dtype)
        add_to_rows(d_k, b, keys, everything, dot(passed, weighted))
        return total + dot(passed.T, tile)

    start = jnp.zeros((q.shape[2], k.shape[2]), jnp.float32)
    d_raw[b, t, heads, everything] = jax.lax.fori_loop(0, tiles_of(places, b, t), add_tile, start)
