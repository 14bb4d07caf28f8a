"""The contract of the indexer loss, in plain jnp.

The attention probabilities are computed a second time from ``lse`` by the very expressions of the attention
references, so that XLA merges the two where both stand in one program.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_mla.reference import masked_scores
from pallas_kernels.softmax import exp_minus
from pallas_kernels.sparse_mla.reference import gather_rows, selected_scores


def _mean_over_heads(scores: Array, lse: Array, *, head_axis: int) -> Array:
    """Attention probabilities from masked scores and their log-sum-exp, averaged over the heads; a constant."""
    return jax.lax.stop_gradient(jnp.mean(exp_minus(scores, lse), axis=head_axis))


def _kl_rows(p: Float[Array, "B T S"], scores: Float[Array, "B T S"], mask: Bool[Array, "B T S"]):
    """``Σ_s p (log p - log softmax(scores))`` over the masked keys of each row."""
    lowest = jnp.finfo(jnp.float32).min
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, lowest), axis=-1)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.sum(jnp.where(mask, p * (log_p - log_q), 0.0), axis=-1)


def dense_indexer_loss(
    scores: Float[Array, "B T S"],
    mask: Bool[Array, "B T S"],
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    lse: Float[Array, "B H T"],
    *,
    scale: float,
) -> Float[Array, "B T"]:
    """See ``api.dense_indexer_loss``."""
    attention = masked_scores(q, k, mask, scale)
    p = _mean_over_heads(attention, lse, head_axis=1)
    return _kl_rows(p, scores, mask)


def sparse_indexer_loss(
    scores: Float[Array, "B T S"],
    indices: Int[Array, "B T K"],
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    lse: Float[Array, "B T H"],
    *,
    scale: float,
) -> Float[Array, "B T"]:
    """See ``api.sparse_indexer_loss``."""
    attention = selected_scores(q, gather_rows(kv, indices), indices, scale)
    p = _mean_over_heads(attention, lse, head_axis=2)
    selected = jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=-1)
    return _kl_rows(p, selected, indices >= 0)
