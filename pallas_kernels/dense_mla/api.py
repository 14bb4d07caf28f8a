"""Masked multi-head attention."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.dense_mla import reference
from pallas_kernels.platform import choose


def dense_mla(
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B S H Q"],
    v: Float[Array, "B S H V"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """``o = softmax(scale · q kᵀ) v`` over the keys where ``mask`` is true, and the float32 log-sum-exp.

    A query that sees nothing gets o = 0 and lse = -inf. Statistics in float32, o in the dtype of ``v``.

    Source: V2 report §2.1 (MHA form of MLA).
    """
    chosen = choose("dense_mla", implementation, {"reference": reference.dense_mla})
    return chosen(q, k, v, mask, scale=scale)
