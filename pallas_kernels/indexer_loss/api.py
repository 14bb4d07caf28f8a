"""Kullback-Leibler divergence from the attention of all heads to the softmax of the index scores."""

from pallas_kernels.indexer_loss import gpu, gpu_dense, reference, tpu, tpu_dense
from pallas_kernels.platform import choose
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.visibility import Visibility


def dense_indexer_loss(
    scores: Float[Array, "B T S"],
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    lse: Float[Array, "B H T"],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """``KL(p[t] ‖ softmax(scores[t]))`` over the attended keys, float32; 0 for a query that sees nothing.

    ``p[t, s]`` is the mean over heads of the attention of ``dense_mla`` with the same arguments, recomputed
    from its ``lse``. It is a constant: the gradient reaches ``scores`` only, and is ``softmax(scores) - p``.
    Over all visible keys this is the warm-up loss, over the selected ones that of sparse training.

    Source: V3.2-Exp report eq. 3 and 4.
    """
    available = {
        "reference": reference.dense_indexer_loss,
        "tpu": tpu_dense.dense_indexer_loss,
        "gpu": gpu_dense.dense_indexer_loss,
    }
    return choose("dense_indexer_loss", implementation, available)(
        scores, q, k, lse, visibility, selected, scale=scale
    )


def sparse_indexer_loss(
    index_q: Float[Array, "B T N J"],
    index_k: Float[Array, "B S J"],
    index_w: Float[Array, "B T N"],
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    lse: Float[Array, "B T H"],
    selection: Int[Array, "B T K"] | UInt32[Array, "B W S"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """The same over selected keys only, with the attention of ``sparse_mla`` from the same selection.

    The index scores are those of ``index_scores``, computed for the selected pairs alone: the gradient reaches
    ``index_q``, ``index_k`` and ``index_w``, and costs nothing for keys that nobody selected.
    """
    available = {
        "reference": reference.sparse_indexer_loss,
        "tpu": tpu.sparse_indexer_loss,
        "gpu": gpu.sparse_indexer_loss,
    }
    return choose("sparse_indexer_loss", implementation, available)(
        index_q, index_k, index_w, q, kv, lse, selection, scale=scale
    )
