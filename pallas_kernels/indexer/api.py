"""Index scores of the lightning indexer."""

from jaxtyping import Array, Float

from pallas_kernels.indexer import reference
from pallas_kernels.platform import choose


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T S"]:
    """``I[t, s] = Σ_n w[t, n] · ReLU(q[t, n] · k[s])``, in float32.

    Constant factors and quantisation scales belong in ``w``, which may be negative. All keys of the block are
    scored; causality and segments are the caller's, who needs them for the selection too. Differentiable in
    ``q``, ``k`` and ``w``.

    Source: V3.2-Exp report eq. 1; checkpoint keys ``indexer.*``.
    """
    return choose("index_scores", implementation, {"reference": reference.index_scores})(q, k, w)
