"""The contract of the indexer loss, in plain jnp.

The attention probabilities are computed a second time from ``lse`` by the very expressions of the attention
references, so that XLA merges the two where both stand in one program.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.accumulate import wide
from pallas_kernels.blocks import map_rows
from pallas_kernels.dense_mla.reference import KeyBlocks, attended, by_heads, masked_scores
from pallas_kernels.indexer.reference import listed_index_scores
from pallas_kernels.selection import require_list
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.softmax import exp_minus
from pallas_kernels.sparse_mla.reference import (
    add_to_rows,
    by_query,
    gather_rows,
    queries_at_a_time,
    selected_scores,
)
from pallas_kernels.visibility import Visibility


def kl_rows(p: Float[Array, "B T S"], scores: Float[Array, "B T S"], mask: Bool[Array, "B T S"]):
    """``Σ_s p (log p - log softmax(scores))`` over the masked keys of each row."""
    scores = scores.astype(wide(scores.dtype))
    lowest = jnp.finfo(scores.dtype).min
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, lowest), axis=-1)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.sum(jnp.where(mask, p * (log_p - log_q), 0.0), axis=-1)


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
    q, k, lse = jax.lax.stop_gradient((q, k, lse))

    def of_some(queries, blocks: KeyBlocks):
        q, lse = queries

        def of_keys(first, p):
            k, mask = blocks.at(first)
            block = jnp.sum(exp_minus(masked_scores(q, k, mask, scale), lse), axis=1, keepdims=True)
            return jax.lax.dynamic_update_slice_in_dim(p, block, first, axis=3)

        sequences, _, keys = blocks.shape
        return blocks.over(of_keys, jnp.zeros((sequences, 1, q.shape[2], keys), wide(q.dtype)))

    sums = by_heads(of_some, (q, lse), (k,), visibility, selected)[..., : scores.shape[2]]
    p = jax.lax.stop_gradient(jnp.sum(sums, axis=1) / q.shape[1])
    return kl_rows(p, scores, attended(visibility, selected))


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
    p = _listed_target(*jax.lax.stop_gradient((q, kv, lse)), indices, scale)
    return kl_rows(p, _listed_scores(index_q, index_k, index_w, indices), indices >= 0)


def _listed_target(q: Array, kv: Array, lse: Array, indices: Array, scale: float) -> Float[Array, "B T K"]:
    """The attention of all heads to each listed key, averaged."""
    flat_indices, rows, *of_queries = by_query(indices, kv, q, lse)

    def of_some(operands):
        indices, q, lse = operands
        scores = selected_scores(q, gather_rows(rows, indices), indices, scale)
        return jnp.mean(exp_minus(scores.swapaxes(1, 2), lse), axis=1)

    number = queries_at_a_time(flat_indices, rows)
    return map_rows(of_some, (flat_indices, *of_queries), number).reshape(indices.shape)


@jax.custom_vjp
def _listed_scores(q: Array, k: Array, w: Array, indices: Array) -> Float[Array, "B T K"]:
    """Index scores of the listed keys."""
    flat_indices, rows, *of_queries = by_query(indices, k, q, w)

    def of_some(operands):
        indices, q, w = operands
        return listed_index_scores(q, gather_rows(rows, indices), w)

    number = queries_at_a_time(flat_indices, rows)
    return map_rows(of_some, (flat_indices, *of_queries), number).reshape(indices.shape)


def _listed_scores_fwd(q, k, w, indices):
    return _listed_scores(q, k, w, indices), (q, k, w, indices)


def _listed_scores_bwd(residuals, d_scores):
    q, k, w, indices = residuals
    flat_indices, rows, *of_queries = by_query(indices, k, q, w, d_scores)

    def of_some(d_rows, operands):
        indices, q, w, d_scores = operands
        _, backward = jax.vjp(listed_index_scores, q, gather_rows(rows, indices), w)
        d_q, d_selected, d_w = backward(d_scores)
        return add_to_rows(d_rows, indices, d_selected), (d_q, d_w)

    d_k, (d_q, d_w) = map_rows(
        of_some,
        (flat_indices, *of_queries),
        queries_at_a_time(flat_indices, rows),
        carry=jnp.zeros(rows.shape, d_scores.dtype),
    )
    return d_q.reshape(q.shape), d_k.reshape(k.shape).astype(k.dtype), d_w.reshape(w.shape), None


_listed_scores.defvjp(_listed_scores_fwd, _listed_scores_bwd)
