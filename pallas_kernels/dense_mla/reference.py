"""The contract of masked multi-head attention, in plain jnp."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.accumulate import einsum
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import unpack_mask
from pallas_kernels.shapes import Array, Bool, Float, UInt32
from pallas_kernels.softmax import exp_minus, output_delta, sum_exp
from pallas_kernels.visibility import Visibility


def masked_scores(
    q: Float[Array, "B H T Q"], k: Float[Array, "B H S Q"], mask: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B H T S"]:
    """``scale · q kᵀ`` in float32, -inf where masked.

    The mask is added as its logarithm, 0 or -inf: XLA on CPUs computes logarithms once, where it would unpack
    and select again for every head.
    """
    scores = einsum("bhtq,bhsq->bhts", q, k)
    bias = jnp.log(mask.astype(scores.dtype))
    return scores * scale + bias[:, None]


def dense_mla(
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    v: Float[Array, "B H S V"],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None = None,
    *,
    scale: float,
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H T"]]:
    """See ``api.dense_mla``."""
    return _attend(q, k, v, attended(visibility, selected), scale)


def attended(visibility: Visibility, selected: UInt32[Array, "B W S"] | None) -> Bool[Array, "B T S"]:
    """True where the query attends to the key."""
    if selected is None:
        return visibility.mask()
    return unpack_mask(selected, visibility.query_index.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, Array]:
    return _softmax_attention(q, k, v, mask, scale)


def _softmax_attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, Array]:
    exponentials, total, lse = sum_exp(masked_scores(q, k, mask, scale))
    o = einsum("bhts,bhsv->bhtv", exponentials.astype(v.dtype), v)
    return (o / total[..., None]).astype(v.dtype), lse


def _forward(q, k, v, mask, scale):
    o, lse = _softmax_attention(q, k, v, mask, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, k, v, mask, o, lse)


def _backward(scale, residuals, gradients):
    q, k, v, mask, o, lse = residuals
    d_o, d_lse = gradients
    p = exp_minus(masked_scores(q, k, mask, scale), lse)
    delta = output_delta(o, d_o, d_lse)
    d_p = einsum("bhtv,bhsv->bhts", d_o, v)
    d_scores = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
    d_q = einsum("bhts,bhsq->bhtq", d_scores, k)
    # Everything as the products like it, tokens last; XLA on CPUs would undo it, at half the speed.
    q_t, d_o_t = jax.lax.optimization_barrier((q.swapaxes(2, 3), d_o.swapaxes(2, 3)))
    d_v = einsum("bhvt,bhts->bhvs", d_o_t, p.astype(d_o.dtype))
    d_k = einsum("bhqt,bhts->bhqs", q_t, d_scores)
    d_k, d_v = jax.lax.optimization_barrier((d_k.astype(k.dtype), d_v.astype(v.dtype)))
    d_k, d_v = d_k.swapaxes(2, 3), d_v.swapaxes(2, 3)
    return d_q.astype(q.dtype), d_k, d_v, None


_attend.defvjp(_forward, _backward)
