"""Normalisations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation: ``y = w · x / sqrt(mean(x²) + eps)``.

    Computed in float32 whatever the input, returned in the input's dtype.

    Source: V3 report §2.1; checkpoint keys ``*_layernorm.weight``, ``model.norm.weight``.
    """

    def __init__(self, dim: int, *, eps: float, axis: str = "embed"):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32), axes=(axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (self.weight[...].astype(jnp.float32) * x32 * inverse_rms).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``y = w · (x - mean(x)) / sqrt(var(x) + eps) + b``, in float32, returned in the input's dtype.

    Source: checkpoint keys ``indexer.k_norm.{weight,bias}``; the only bias in the model.
    """

    def __init__(self, dim: int, *, eps: float, axis: str):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32), axes=(axis,))

    def __call__(self, x: Float[Array, "*B J"]) -> Float[Array, "*B J"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse_std = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = self.weight[...].astype(jnp.float32) * centred * inverse_std + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
