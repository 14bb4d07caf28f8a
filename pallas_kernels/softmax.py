"""Softmax over scores that may all be masked."""

import math

import jax.numpy as jnp

from pallas_kernels.shapes import Array, Float

LOG2_E = math.log2(math.e)  # kernels compute powers of two: that is what the hardware has
# In kernels, the score of a key that is not a query's: far below half of it, where the highest score begins.
LOW = -1e30


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


def output_delta(
    o: Float[Array, "*B X"], d_o: Float[Array, "*B X"], d_lse: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """What the gradient of every score of a row has in common, ``Σ o · do - dlse``."""
    return jnp.sum(o.astype(d_lse.dtype) * d_o.astype(d_lse.dtype), axis=-1) - d_lse


def to_base_2(lse: Float[Array, "*B"], of_nothing: float = 0.0) -> Float[Array, "*B"]:
    """The log-sum-exp as kernels use it; ``of_nothing`` for a row of -inf."""
    return jnp.where(jnp.isfinite(lse), lse * LOG2_E, of_nothing)
