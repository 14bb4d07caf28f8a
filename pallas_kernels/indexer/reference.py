"""The contract of the index scores, in plain jnp, one head at a time.

A sum over heads of all products at once would read an array that is as many times larger than the scores as there
are heads, and XLA on CPUs adds along an inner axis one number at a time: six times as slow.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.accumulate import einsum, wide
from pallas_kernels.shapes import Array, Float
from pallas_kernels.visibility import Visibility

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
    scores = _scores(q, k, w)
    if k_scale is not None:
        scores *= k_scale[:, None, :]
    return jnp.where(visibility.mask(), scores, -jnp.inf)


def listed_index_scores(
    q: Float[Array, "T N J"], k: Float[Array, "T K J"], w: Float[Array, "T N"]
) -> Float[Array, "T K"]:
    """The same where every query has keys of its own."""
    return _over_heads(einsum("tnj,tkj->tnk", q, k), w)


def _over_heads(products: Float[Array, "*B N S"], w: Float[Array, "*B N"]) -> Float[Array, "*B S"]:
    return einsum("...n,...ns->...s", w.astype(products.dtype), jax.nn.relu(products))


@jax.custom_vjp
def _scores(q: Array, k: Array, w: Array) -> Array:
    if q.shape[1] <= _FEW:
        return _over_heads(einsum("btnj,bsj->btns", q, k), w)

    def add_head(total, head):
        q_n, w_n = head
        return total + w_n[..., None] * jax.nn.relu(einsum("btj,bsj->bts", q_n, k)), None

    start = jnp.zeros((*q.shape[:2], k.shape[1]), wide(q.dtype))
    return jax.lax.scan(add_head, start, _by_head(q, w))[0]


def _by_head(q: Array, w: Array) -> tuple[Array, Array]:
    return jnp.moveaxis(q, 2, 0), jnp.moveaxis(w, 2, 0)


def _scores_fwd(q, k, w):
    return _scores(q, k, w), (q, k, w)


def _scores_bwd(residuals, d_scores):
    """With ``g = dI · 1[q·k > 0]`` of a head: ``dq = w · (g k)``, ``dw = q · (g k)`` and ``dk = Σ_n gᵀ (w q)``."""
    q, k, w = residuals

    def add_head(d_k, head):
        q_n, w_n = head
        passed = jnp.where(einsum("btj,bsj->bts", q_n, k) > 0, d_scores, 0)
        d_raw = einsum("bts,bsj->btj", passed, k.astype(passed.dtype))
        weighted = q_n.astype(passed.dtype) * w_n[..., None]
        d_k += einsum("bts,btj->bsj", passed, weighted)
        return d_k, (d_raw * w_n[..., None], jnp.sum(d_raw * q_n, axis=-1))

    start = jnp.zeros(k.shape, d_scores.dtype)
    d_k, (d_q, d_w) = jax.lax.scan(add_head, start, _by_head(q, w))
    d_q, d_w = jnp.moveaxis(d_q, 0, 2), jnp.moveaxis(d_w, 0, 2)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_w.astype(w.dtype)


_scores.defvjp(_scores_fwd, _scores_bwd)
