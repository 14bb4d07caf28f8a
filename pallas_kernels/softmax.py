"""Softmax over scores that may all be masked."""

import jax.numpy as jnp

from pallas_kernels.shapes import Array, Float


def sum_exp(
    scores: Float[Array, "*B S"],
) -> tuple[Float[Array, "*B S"], Float[Array, "*B"], Float[Array, "*B"]]:
    """``exp(scores - max)``, its sum (1 for a row of -inf, whose terms are 0), and the log-sum-exp."""
    highest = jnp.max(scores, axis=-1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1)
    lse = jnp.log(total) + highest[..., 0]
    return exponentials, jnp.where(total == 0, 1.0, total), lse


def exp_minus(scores: Float[Array, "*B S"], lse: Float[Array, "*B"]) -> Float[Array, "*B S"]:
    """Softmax probabilities from scores and their log-sum-exp; 0 in a row of -inf."""
    return jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
