"""The contract of the index scores, in plain jnp: one head at a time, over a block of keys after another.

A sum over heads of all products at once would read an array that is as many times larger than the scores as there
are heads, and XLA on CPUs adds along an inner axis one number at a time: six times as slow.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.accumulate import einsum, wide
from pallas_kernels.blocks import over_seen_keys, pad_axis, pad_visibility
from pallas_kernels.shapes import Array, Float
from pallas_kernels.visibility import Visibility

_KEYS = 1024  # of a block, whose scores stay in a core's cache
_UNROLLED = 4  # heads, whose products are added to the sum in one pass over it
_FEW = 8  # queries, as when decoding: reading all keys once for each head would cost more than what it saves


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    visibility: Visibility,
    k_scale: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T S"]:
    """``Σ_n w · ReLU(q · k) · k_scale``: see ``api.index_scores``."""
    if q.dtype == jnp.float8_e4m3fn:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = _scores(q, k, w, visibility)
    if k_scale is not None:
        scores *= k_scale[:, None, :]  # which is positive
    return scores


def listed_index_scores(
    q: Float[Array, "T N J"], k: Float[Array, "T K J"], w: Float[Array, "T N"]
) -> Float[Array, "T K"]:
    """The same where every query has keys of its own."""
    return _over_heads(einsum("tnj,tkj->tnk", q, k), w)


def _over_heads(products: Float[Array, "*B N S"], w: Float[Array, "*B N"]) -> Float[Array, "*B S"]:
    return einsum("...n,...ns->...s", w.astype(products.dtype), jax.nn.relu(products))


@jax.custom_vjp
def _scores(q: Array, k: Array, w: Array, visibility: Visibility) -> Array:
    if q.shape[1] <= _FEW:
        return jnp.where(visibility.mask(), _over_heads(einsum("btnj,bsj->btns", q, k), w), -jnp.inf)
    keys, size = k.shape[1], min(_KEYS, k.shape[1])
    k, visibility = pad_axis(k, 1, size), pad_visibility(visibility, 1, size)

    def score_keys(first, scores):
        block = jax.lax.dynamic_slice_in_dim(k, first, size, axis=1)

        def add_head(total, head):
            q_n, w_n = head
            return total + w_n[..., None] * jax.nn.relu(einsum("btj,bsj->bts", q_n, block)), None

        # Masked at the beginning: XLA on CPUs would do it in one thread where the block is put in its place.
        start = jnp.where(visibility.of_keys(first, size).mask(), jnp.zeros((), wide(q.dtype)), -jnp.inf)
        total, _ = jax.lax.scan(add_head, start, _by_head(q, w), unroll=_UNROLLED)
        return jax.lax.dynamic_update_slice_in_dim(scores, total, first, axis=2)

    nothing = jnp.full((*q.shape[:2], k.shape[1]), -jnp.inf, wide(q.dtype))
    return over_seen_keys(score_keys, nothing, visibility, size)[..., :keys]


def _by_head(q: Array, w: Array) -> tuple[Array, Array]:
    return jnp.moveaxis(q, 2, 0), jnp.moveaxis(w, 2, 0)


def _scores_fwd(q, k, w, visibility):
    return _scores(q, k, w, visibility), (q, k, w, visibility)


def _scores_bwd(residuals, d_scores):
    """With ``g = dI · 1[q·k > 0]`` of a head: ``dq = w · (g k)``, ``dw = q · (g k)`` and ``dk = Σ_n gᵀ (w q)``."""
    q, k, w, visibility = residuals
    keys, size = k.shape[1], min(_KEYS, k.shape[1])
    k, visibility = pad_axis(k, 1, size), pad_visibility(visibility, 1, size)
    d_scores = pad_axis(d_scores, 2, size)
    heads = _by_head(q, w)

    def differentiate_keys(first, gradients):
        d_raw, d_k = gradients
        block = jax.lax.dynamic_slice_in_dim(k, first, size, axis=1)
        d_block = jax.lax.dynamic_slice_in_dim(d_scores, first, size, axis=2)
        d_block = jnp.where(visibility.of_keys(first, size).mask(), d_block, 0)

        def add_head(d_keys, head):
            q_n, w_n = head
            passed = jnp.where(einsum("btj,bsj->bts", q_n, block) > 0, d_block, 0)
            weighted = q_n.astype(passed.dtype) * w_n[..., None]
            d_keys += einsum("bts,btj->bsj", passed, weighted)
            return d_keys, einsum("bts,bsj->btj", passed, block.astype(passed.dtype))

        d_keys, of_heads = jax.lax.scan(add_head, jnp.zeros(block.shape, d_scores.dtype), heads)
        return d_raw + of_heads, jax.lax.dynamic_update_slice_in_dim(d_k, d_keys, first, axis=1)

    start = jnp.zeros(heads[0].shape, d_scores.dtype), jnp.zeros(k.shape, d_scores.dtype)
    d_raw, d_k = over_seen_keys(differentiate_keys, start, visibility, size)
    d_raw = jnp.moveaxis(d_raw, 0, 2)  # of w q
    d_q, d_w = d_raw * w[..., None], jnp.sum(d_raw * q, axis=-1)
    return d_q.astype(q.dtype), d_k[:, :keys].astype(k.dtype), d_w.astype(w.dtype), None


_scores.defvjp(_scores_fwd, _scores_bwd)
