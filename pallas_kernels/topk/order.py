"""Scores as integers that compare as they do."""

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Array, Float, Int

MINUS_INFINITY = -0x7F800001  # the integer of -inf: no key


def ordered(scores: Float[Array, "*B S"]) -> Int[Array, "*B S"]:
    """int32 in the order of the float32 scores; both zeros are 0: they tie."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def score_of(key: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The score of an integer that ``ordered`` gives."""
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key), jnp.float32)
