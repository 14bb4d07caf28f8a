"""Rotary position embedding with YaRN, in the two layouts that the model uses."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig, RopeScaling


class Rope(NamedTuple):
    """Rotation of every position: cosine and sine of its angles, one for each pair of dimensions; float32."""

    cos: Float[Array, "B T R/2"]
    sin: Float[Array, "B T R/2"]


def frequencies(config: ModelConfig) -> Float[np.ndarray, "R/2"]:
    """Radians a token for each pair, float32: ``theta^(-2i/R)``, blended by YaRN beyond the original length.

    Source: YaRN §3; ``config.json: rope_theta, rope_scaling``.
    """
    dim = config.qk_rope_head_dim
    plain = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if not config.uses_yarn:
        return plain.astype(np.float32)
    scaling = config.rope_scaling
    keep = _share_kept(dim, config.rope_theta, scaling)
    return (plain / scaling.factor * (1 - keep) + plain * keep).astype(np.float32)


def _share_kept(dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, "R/2"]:
    """1 for pairs that turn often within the original length and stay as they are, 0 for those interpolated."""

    def pair_turning(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0, 1)


def rope_at(positions: Int[Array, "B T"], config: ModelConfig) -> Rope:
    """The rotations of ``positions``; computed once a forward pass and used by every layer."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def _over_heads(x: Array, rope: Rope) -> Rope:
    """Inserts the axes that ``x`` has between the tokens and its last one."""
    middle = (1,) * (x.ndim - rope.cos.ndim)
    shape = (*rope.cos.shape[:-1], *middle, rope.cos.shape[-1])
    return Rope(rope.cos.reshape(shape), rope.sin.reshape(shape))


def rotate_interleaved(x: Float[Array, "B T *H R"], rope: Rope) -> Float[Array, "B T *H R"]:
    """Turns the pairs (2i, 2i+1): the layout of MLA. Float32 inside, returned in the dtype of ``x``.

    Pairs stay where they are, as in the released code, so a cached rotary key equals its own.
    """
    cos, sin = (jnp.repeat(part, 2, axis=-1) for part in _over_heads(x, rope))
    own = x.astype(jnp.float32)
    is_first = jnp.arange(x.shape[-1]) % 2 == 0
    # Not as an axis of pairs, which accelerators would move everything in memory for.
    other = jnp.where(is_first, -jnp.roll(own, -1, axis=-1), jnp.roll(own, 1, axis=-1))
    return (own * cos + other * sin).astype(x.dtype)


def rotate_half(x: Float[Array, "B T *H R"], rope: Rope) -> Float[Array, "B T *H R"]:
    """Turns the pairs (i, i + R/2): the layout of the indexer. Float32 inside, returned in the dtype of ``x``."""
    cos, sin = _over_heads(x, rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
