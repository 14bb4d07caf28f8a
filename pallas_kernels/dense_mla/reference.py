"""The contract of masked multi-head attention, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.softmax import masked_softmax


def masked_scores(
    q: Float[Array, "B T H Q"], k: Float[Array, "B S H Q"], mask: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B H T S"]:
    """``scale · q kᵀ`` in float32, -inf where masked."""
    scores = jnp.einsum("bthq,bshq->bhts", q * scale, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], scores, -jnp.inf)


def dense_mla(
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B S H Q"],
    v: Float[Array, "B S H V"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See ``api.dense_mla``."""
    weights, lse = masked_softmax(masked_scores(q, k, mask, scale))
    o = jnp.einsum("bhts,bshv->bthv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return o.astype(v.dtype), lse.transpose(0, 2, 1)
