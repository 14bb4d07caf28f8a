"""Kullback-Leibler divergence from the attention of all heads to the softmax of the index scores."""

import jax.numpy as jnp

from pallas_kernels import checks
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

    Raises UnsupportedError for arguments that do not fit.

    Source: V3.2-Exp report eq. 3 and 4.
    """
    available = {
        "reference": reference.dense_indexer_loss,
        "tpu": tpu_dense.dense_indexer_loss,
        "gpu": gpu_dense.dense_indexer_loss,
    }
    op = "dense_indexer_loss"
    chosen = choose(op, implementation, available)
    attention = {"q": (q, "B H T Q"), "k": (k, "B H S Q"), "lse": (lse, "B H T")}
    checks.attended(op, attention | {"scores": (scores, "B T S")}, visibility, selected)
    checks.alike(op, {"q": q, "k": k})
    numbers = {"scores": scores, "q": q, "k": k, "lse": lse}
    checks.floats(op, numbers, kernel=chosen is not reference.dense_indexer_loss)
    if q.dtype != jnp.float64:
        checks.short_floats(op, {"lse": lse})
    return chosen(scores, q, k, lse, visibility, selected, scale=checks.factor(op, "scale", scale))


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
    ``index_q``, ``index_k`` and ``index_w``, and costs nothing for keys that nobody selected. TPUs multiply in
    bfloat16 whatever the dtype.

    Raises UnsupportedError for arguments that do not fit.
    """
    available = {
        "reference": reference.sparse_indexer_loss,
        "tpu": tpu.sparse_indexer_loss,
        "gpu": gpu.sparse_indexer_loss,
    }
    op = "sparse_indexer_loss"
    chosen = choose(op, implementation, available)
    index = {"index_q": (index_q, "B T N J"), "index_k": (index_k, "B S J"), "index_w": (index_w, "B T N")}
    attention = {"q": (q, "B T H X"), "kv": (kv, "B S X"), "lse": (lse, "B T H")}
    checks.shapes(op, index | attention)
    checks.alike(op, {"index_q": index_q, "index_k": index_k})
    checks.alike(op, {"q": q, "kv": kv})
    numbers = {name: array for name, (array, _) in (index | attention).items()}
    checks.floats(op, numbers, kernel=chosen is not reference.sparse_indexer_loss)
    selection = checks.selection_of(op, selection, q.shape[0], q.shape[1], kv.shape[1])
    scale = checks.factor(op, "scale", scale)
    return chosen(index_q, index_k, index_w, q, kv, lse, selection, scale=scale)
