"""Masked multi-head attention."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.dense_mla import reference
from pallas_kernels.platform import choose


def dense_mla(
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    v: Float[Array, "B H S V"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H T"]]:
    """``o = softmax(scale · q kᵀ) v`` over the keys where ``mask`` is true, and the float32 log-sum-exp.

    A query that sees nothing gets o = 0 and lse = -inf. Statistics in float32, o in the dtype of ``v``.
    Differentiable in ``q``, ``k`` and ``v``; the backward pass needs o and lse (named in ``residuals``) and
    computes the probabilities again.

    Source: V2 report §2.1 (MHA form of MLA).
    """
    chosen = choose("dense_mla", implementation, {"reference": reference.dense_mla})
    return chosen(q, k, v, mask, scale=scale)
