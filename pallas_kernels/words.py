"""bfloat16 numbers in 32-bit words, which is what a TPU copies and a row of a cache is made of."""

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Array, Float, Int, UInt32


def halves(x: Array) -> UInt32[Array, "B S X"]:
    """The bits of bfloat16 numbers, in the lower halves of words."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)


def paired(x: Array) -> UInt32[Array, "B S X/2"]:
    """Each word holds a number of the first half of the features below one of the second."""
    low, high = jnp.split(halves(x), 2, axis=-1)
    return low | (high << 16)


def upper_half(words: Int[Array, "K X"]) -> Float[Array, "K X"]:
    """The bfloat16 numbers in the upper halves of words."""
    return jax.lax.bitcast_convert_type(words & jnp.int32(-65536), jnp.float32).astype(jnp.bfloat16)
