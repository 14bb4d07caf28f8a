"""FP8 weights: matrices in e4m3 with a float32 scale for each block of 128 by 128."""

import functools

import jax
import jax.numpy as jnp
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
    weight: Float[Array, "*B M N"], *, power_of_two: bool
) -> tuple[Float[Array, "*B M N"], Float[Array, "*B m n"]]:
    """Values in e4m3 and float32 scales, ``max|block| / 448`` or the next power of two; 1 for a block of zeros.

    The scale of a block that holds a number that is not finite is not finite.

    Weights that came out of ``dequantise`` with scales that are powers of two keep every value.
    """
    # An argument: division by a constant is compiled as multiplication by its rounded reciprocal.
    return _quantise(weight, jnp.float32(E4M3_MAX), power_of_two=power_of_two)


@functools.partial(jax.jit, static_argnames="power_of_two")
def _quantise(
    weight: Float[Array, "*B M N"], largest: Float[Array, ""], *, power_of_two: bool
) -> tuple[Float[Array, "*B M N"], Float[Array, "*B m n"]]:
    weight = weight.astype(jnp.float32)
    rows, columns = weight.shape[-2:]
    edges = [(0, 0)] * (weight.ndim - 2) + [(0, -rows % BLOCK), (0, -columns % BLOCK)]
    magnitude = jnp.where(jnp.isnan(weight), jnp.inf, jnp.abs(weight))  # a maximum may pass over NaN
    blocks = jnp.pad(magnitude, edges)
    blocks = blocks.reshape(*weight.shape[:-2], blocks.shape[-2] // BLOCK, BLOCK, -1, BLOCK)
    amax = jnp.max(blocks, axis=(-3, -1))
    scale = jnp.maximum(amax / largest, jnp.finfo(jnp.float32).tiny)
    rounded = power_of_two_at_least(scale) if power_of_two else scale
    scale = jnp.select([amax == 0, jnp.isinf(amax)], [1.0, amax], rounded)
    scaled = weight / _spread(scale, weight.shape)
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scale


def _spread(scale: Float[Array, "*B m n"], shape: tuple[int, ...]) -> Float[Array, "*B M N"]:
    """Each scale at all elements of its block."""
    spread = jnp.repeat(jnp.repeat(scale, BLOCK, axis=-2), BLOCK, axis=-1)
    return spread[..., : shape[-2], : shape[-1]]
