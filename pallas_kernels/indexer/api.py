"""Index scores of the lightning indexer."""

from pallas_kernels.indexer import gpu, reference, tpu
from pallas_kernels.platform import choose
from pallas_kernels.shapes import Array, Float
from pallas_kernels.visibility import Visibility


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    visibility: Visibility,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T S"]:
    """``I[t, s] = Σ_n w[t, n] · ReLU(q[t, n] · k[s])`` in float32; -inf where the query may not see the key.

    Constant factors and quantisation scales belong in ``w``, which may be negative. Differentiable in ``q``, ``k``
    and ``w``; the array is quadratic: call it on blocks of queries.

    Source: V3.2-Exp report eq. 1; checkpoint keys ``indexer.*``.
    """
    available = {"reference": reference.index_scores, "tpu": tpu.index_scores, "gpu": gpu.index_scores}
    return choose("index_scores", implementation, available)(q, k, w, visibility)
