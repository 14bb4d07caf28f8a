"""The contract of the indexer loss, in plain jnp.

The attention probabilities are computed a second time from ``lse`` by the very expressions of the attention
references, so that XLA merges the two where both stand in one program.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.accumulate import wide
from pallas_kernels.dense_mla.reference import attended, masked_scores
from pallas_kernels.indexer.reference import listed_index_scores
from pallas_kernels.selection import require_list
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.softmax import exp_minus
from pallas_kernels.sparse_mla.reference import gather_rows, selected_scores
from pallas_kernels.visibility import Visibility


def _mean_over_heads(scores: Array, lse: Array, *, head_axis: int) -> Array:
    """Attention probabilities from masked scores and their log-sum-exp, averaged over the heads; a constant."""
    return jax.lax.stop_gradient(jnp.mean(exp_minus(scores, lse), axis=head_axis))


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
    mask = attended(visibility, selected)
    p = _mean_over_heads(masked_scores(q, k, mask, scale), lse, head_axis=1)
    return kl_rows(p, scores, mask)


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
    attention = selected_scores(q, gather_rows(kv, indices), indices, scale)
    p = _mean_over_heads(attention, lse, head_axis=2)
    scores = listed_index_scores(index_q, gather_rows(index_k, indices), index_w)
    return kl_rows(p, scores, indices >= 0)
