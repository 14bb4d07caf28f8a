"""Kullback-Leibler divergence from the attention of all heads to the softmax of the index scores."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.indexer_loss import reference
from pallas_kernels.platform import choose


def dense_indexer_loss(
    scores: Float[Array, "B T S"],
    mask: Bool[Array, "B T S"],
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    lse: Float[Array, "B H T"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """``KL(p[t] ‖ softmax(scores[t]))`` over the masked keys, float32; 0 for a query that sees nothing.

    ``p[t, s]`` is the mean over heads of the attention of ``dense_mla`` with the same arguments, recomputed
    from its ``lse``. It is a constant: the gradient reaches ``scores`` only, and is ``softmax(scores) - p``.
    With the visible keys as ``mask`` this is the warm-up loss, with the selected ones that of sparse training.

    Source: V3.2-Exp report eq. 3 and 4.
    """
    available = {"reference": reference.dense_indexer_loss}
    return choose("dense_indexer_loss", implementation, available)(scores, mask, q, k, lse, scale=scale)


def sparse_indexer_loss(
    scores: Float[Array, "B T S"],
    indices: Int[Array, "B T K"],
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    lse: Float[Array, "B T H"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """The same over a list of selected keys, with the attention of ``sparse_mla``."""
    available = {"reference": reference.sparse_indexer_loss}
    return choose("sparse_indexer_loss", implementation, available)(scores, indices, q, kv, lse, scale=scale)
