"""Softmax over scores that may all be masked."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def masked_softmax(scores: Float[Array, "*B S"]) -> tuple[Float[Array, "*B S"], Float[Array, "*B"]]:
    """Softmax over the last axis and its log-sum-exp; -inf everywhere gives weights 0 and lse -inf.

    The subtracted maximum carries no gradient, so none of it turns into NaN where a row is empty.
    """
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    safe_total = jnp.where(total == 0, 1.0, total)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(safe_total) + highest)
    return exponentials / safe_total, lse[..., 0]
