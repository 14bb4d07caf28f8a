"""What sums are computed in: float32 at least, and float64 where the operands are."""

import jax.numpy as jnp

from pallas_kernels.shapes import Array


def wide(dtype) -> jnp.dtype:
    """float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def einsum(subscripts: str, a: Array, b: Array) -> Array:
    """The product, summed and returned wide."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide(a.dtype))
