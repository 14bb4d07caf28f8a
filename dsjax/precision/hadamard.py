"""The orthonormal Hadamard rotation that spreads outliers before quantisation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def hadamard_matrix(size: int) -> Float[np.ndarray, "J J"]:
    """Sylvester's matrix of ±1, float32. ``size`` must be a power of two (ValueError otherwise)."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of size {size} needs a power of two")
    index = np.arange(size)
    odd = np.array([[(int(i) & int(j)).bit_count() % 2 for j in index] for i in index])
    return np.where(odd, -1.0, 1.0).astype(np.float32)


def rotate(x: Float[Array, "*B J"]) -> Float[Array, "*B J"]:
    """``H x · J^-0.5``: computed in float32, returned in the dtype of ``x``. Dot products are preserved.

    Source: V3.2-Exp released inference code (``rotate_activation``).
    """
    size = x.shape[-1]
    rotated = jnp.matmul(x.astype(jnp.float32), hadamard_matrix(size), precision="highest")
    return (rotated * np.float32(size**-0.5)).astype(x.dtype)
