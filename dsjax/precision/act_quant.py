"""Online activation quantisation to e4m3 with power-of-two scales, as the released indexer does it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX = 448.0
_SMALLEST_AMAX = 1e-4


def power_of_two_at_least(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The smallest power of two that is not below ``x`` (ue8m0 rounding); exact, for positive normal float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def act_quant(
    x: Float[Array, "*B D"], *, group_size: int = 128
) -> tuple[Float[Array, "*B D"], Float[Array, "*B G"]]:
    """``y = e4m3(clamp(x / s, ±448))`` and ``s``, one scale for each group of the last axis.

    ``s = 2^⌈log₂(max(|x|, 1e-4) / 448)⌉``. A last axis shorter than ``group_size`` is one group. Returns y in
    float8_e4m3fn and s in float32; ``y · s`` restores x to e4m3's precision.

    Source: V3.2-Exp released inference code (``act_quant`` with ue8m0 scales).
    """
    group_size = min(group_size, x.shape[-1])
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group_size)
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), _SMALLEST_AMAX)
    scale = power_of_two_at_least(amax / E4M3_MAX)
    y = jnp.clip(groups / scale[..., None], -E4M3_MAX, E4M3_MAX)
    return y.reshape(x.shape).astype(jnp.float8_e4m3fn), scale


def fake_quant(x: Float[Array, "*B D"], *, group_size: int = 128) -> Float[Array, "*B D"]:
    """``act_quant`` and back: the values that the quantised computation sees, in the dtype of ``x``.

    Scales are powers of two, so float32 products of these values differ from products of the e4m3 values with
    the scales multiplied in by nothing but the order of summation. The gradient passes straight through.
    """
    y, scale = act_quant(jax.lax.stop_gradient(x), group_size=group_size)
    groups = y.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    restored = groups.reshape(x.shape).astype(x.dtype)
    return x + (restored - jax.lax.stop_gradient(x))
