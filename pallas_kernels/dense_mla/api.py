"""Masked multi-head attention."""

from pallas_kernels import checks
from pallas_kernels.dense_mla import gpu, reference, tpu
from pallas_kernels.platform import choose
from pallas_kernels.shapes import Array, Float, UInt32
from pallas_kernels.visibility import Visibility


def dense_mla(
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    v: Float[Array, "B H S V"],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H T"]]:
    """``o = softmax(scale · q kᵀ) v`` and the float32 log-sum-exp, over the keys that each query sees.

    With ``selected``, a packed mask (``selection``) of keys that it sees, over those alone. A query that sees
    nothing gets o = 0 and lse = -inf. Statistics in float32, o in the dtype of ``v``. Differentiable in ``q``,
    ``k`` and ``v``; the backward pass needs o and lse (named in ``residuals``) and computes the probabilities
    again.

    Raises UnsupportedError for arguments that do not fit.

    Source: V2 report §2.1 (MHA form of MLA).
    """
    available = {"reference": reference.dense_mla, "tpu": tpu.dense_mla, "gpu": gpu.dense_mla}
    chosen = choose("dense_mla", implementation, available)
    op, kernel = "dense_mla", chosen is not reference.dense_mla
    checks.attended(op, {"q": (q, "B H T Q"), "k": (k, "B H S Q"), "v": (v, "B H S V")}, visibility, selected)
    checks.alike(op, {"q": q, "k": k, "v": v})
    checks.floats(op, {"q": q, "k": k, "v": v}, kernel=kernel)
    return chosen(q, k, v, visibility, selected, scale=checks.factor(op, "scale", scale))
