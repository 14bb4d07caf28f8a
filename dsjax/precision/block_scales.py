"""FP8 weights: matrices in e4m3 with a float32 scale for each block of 128 by 128."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsjax.precision.act_quant import E4M3_MAX, power_of_two_at_least

BLOCK = 128  # rows and columns that share a scale; those at the edges may be fewer


@functools.partial(jax.jit, static_argnames="dtype")
def dequantise(values: Float[Array, "*B M N"], scale: Float[Array, "*B m n"], dtype: str) -> Array:
    """``w[i, j] = values[i, j] · scale[i / 128, j / 128]`` in float32, rounded once to ``dtype``.

    Source: V3's ``README_WEIGHTS.md``; checkpoint keys ``*.weight`` and ``*.weight_scale_inv``.
    """
    return (values.astype(jnp.float32) * _spread(scale, values.shape)).astype(dtype)


def quantise(
    weight: Float[Array, "*B M N"] | Float[np.ndarray, "*B M N"], *, power_of_two: bool
) -> tuple[Float[Array, "*B M N"], Float[np.ndarray, "*B m n"]]:
    """Values in e4m3 and float32 scales, ``max|block| / 448`` or the next power of two; 1 for a block of zeros.

    The scale of a block that holds a number that is not finite is infinite. Weights that came out of ``dequantise``
    with scales that are powers of two keep every value.
    """
    largest = np.asarray(_largest(weight))
    # In numpy: XLA compiles division by one number as multiplication by its rounded reciprocal.
    scale = np.maximum(largest / np.float32(E4M3_MAX), np.finfo(np.float32).tiny)
    if power_of_two:
        scale = np.where(np.isinf(scale), scale, power_of_two_at_least(jnp.asarray(scale)))
    scale = np.where(largest == 0, np.float32(1), scale)
    return _scaled(weight, scale), scale


@jax.jit
def _largest(weight: Float[Array, "*B M N"]) -> Float[Array, "*B m n"]:
    """Absolute value in each block, float32; infinite for one that is no number."""
    rows, columns = weight.shape[-2:]
    magnitude = jnp.abs(weight.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)  # a maximum may pass over NaN
    edges = [(0, 0)] * (weight.ndim - 2) + [(0, -rows % BLOCK), (0, -columns % BLOCK)]
    blocks = jnp.pad(magnitude, edges)
    blocks = blocks.reshape(*weight.shape[:-2], blocks.shape[-2] // BLOCK, BLOCK, -1, BLOCK)
    return jnp.max(blocks, axis=(-3, -1))


@jax.jit
def _scaled(weight: Float[Array, "*B M N"], scale: Float[Array, "*B m n"]) -> Float[Array, "*B M N"]:
    """In e4m3."""
    values = weight.astype(jnp.float32) / _spread(scale, weight.shape)
    return jnp.clip(values, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def _spread(scale: Float[Array, "*B m n"], shape: tuple[int, ...]) -> Float[Array, "*B M N"]:
    """Each scale at all elements of its block."""
    spread = jnp.repeat(jnp.repeat(scale, BLOCK, axis=-2), BLOCK, axis=-1)
    return spread[..., : shape[-2], : shape[-1]]
