"""Choosing the next token from its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sample(
    logits: Float[Array, "B V"], key: PRNGKeyArray, *, temperature: float, top_p: float
) -> Int[Array, "B"]:
    """A token from ``softmax(logits / temperature)`` cut to its nucleus; temperature 0 takes the best.

    The nucleus is the smallest set of most probable tokens that holds ``top_p`` of the probability.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        logits = jnp.where(_nucleus(logits, top_p), logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B V"], top_p: float):
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    place = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, place, axis=-1)
