"""The contract of sparse attention, in plain jnp: gather, then attend, a few queries at a time.

What is gathered for them then stays in the cache until it is multiplied. Gathered keys stand in the rows of every
product that can have them there: they are many more than the heads, and XLA on CPUs multiplies tall matrices faster.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.accumulate import einsum, wide
from pallas_kernels.blocks import map_rows
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import require_list
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.softmax import output_delta, sum_exp

_GATHERED = 1 << 22  # numbers at a time: 16 MB


def gather_rows(rows: Float[Array, "S X"], indices: Int[Array, "N K"]) -> Float[Array, "N K X"]:
    """The rows that each query selected; index -1 gives row 0, for the caller to mask."""
    return jnp.asarray(rows).at[jnp.maximum(indices, 0)].get(mode="promise_in_bounds")


def selected_scores(
    q: Float[Array, "N H X"], selected: Float[Array, "N K X"], indices: Int[Array, "N K"], scale: float
) -> Float[Array, "N K H"]:
    """``scale · q · kv`` in float32 for the gathered rows, -inf where the index is -1."""
    scores = einsum("nkx,nhx->nkh", selected, q)
    return jnp.where(indices[..., None] >= 0, scores * scale, -jnp.inf)


def by_query(indices: Int[Array, "B T K"], keys: Float[Array, "B S X"], *others: Array) -> tuple:
    """All sequences as one: indices [B·T, K] into keys [B·S, X], then the keys, then [B·T, ...] of the others."""
    first = jnp.arange(keys.shape[0], dtype=jnp.int32)[:, None, None] * keys.shape[1]
    indices = jnp.where(indices >= 0, indices + first, -1)
    flat = (jnp.reshape(x, (-1, *x.shape[2:])) for x in (indices, keys, *others))
    return tuple(flat)


def queries_at_a_time(indices: Int[Array, "N K"], keys: Float[Array, "S X"]) -> int:
    """So many that what they gather stays in a cache."""
    return max(1, _GATHERED // (indices.shape[-1] * keys.shape[-1]))


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.sparse_mla``."""
    require_list("sparse_mla", indices)
    return _attend(q, kv, indices, latent_dim, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: Array, kv: Array, indices: Array, latent_dim: int, scale: float) -> tuple[Array, Array]:
    return _attend_all(q, kv, indices, latent_dim, scale)


def _attend_all(q: Array, kv: Array, indices: Array, latent_dim: int, scale: float) -> tuple[Array, Array]:
    flat_indices, rows, flat_q = by_query(indices, kv, q)

    def attend_queries(operands):
        q, indices = operands
        selected = gather_rows(rows, indices)
        exponentials, total, lse = sum_exp(selected_scores(q, selected, indices, scale).swapaxes(1, 2))
        # Of whole rows: cutting the latents out of them costs more than multiplying the rest.
        o = einsum("nhk,nkx->nhx", exponentials.astype(kv.dtype), selected)[..., :latent_dim]
        return (o / total[..., None]).astype(kv.dtype), lse

    o, lse = map_rows(attend_queries, (flat_q, flat_indices), queries_at_a_time(flat_indices, rows))
    return o.reshape(*q.shape[:3], latent_dim), lse.reshape(q.shape[:3])


def _forward(q, kv, indices, latent_dim, scale):
    o, lse = _attend_all(q, kv, indices, latent_dim, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, kv, indices, o, lse)


def _backward(latent_dim, scale, residuals, gradients):
    q, kv, indices, o, lse = residuals
    d_o, d_lse = gradients
    delta = output_delta(o, d_o, d_lse)
    lse = jnp.where(jnp.isfinite(lse), lse, 0)
    flat_indices, rows, *of_queries = by_query(indices, kv, q, lse, d_o, delta)
    no_rope = [(0, 0), (0, 0), (0, q.shape[-1] - latent_dim)]

    def differentiate_queries(d_rows, operands):
        indices, q, lse, d_o, delta = operands
        selected = gather_rows(rows, indices)
        p = jnp.exp(selected_scores(q, selected, indices, scale) - lse[:, None])
        d_p = einsum("nkc,nhc->nkh", selected[..., :latent_dim], d_o)
        d_scores = (p * (d_p - delta[:, None]) * scale).astype(q.dtype)
        d_q = einsum("nkh,nkx->nhx", d_scores, selected).astype(q.dtype)
        # Both parts of the keys' gradient in one product: as scores, and as values.
        factors = jnp.concatenate([d_scores, p.astype(q.dtype)], axis=2)
        of_keys = jnp.concatenate([q, jnp.pad(d_o, no_rope)], axis=1)
        return add_to_rows(d_rows, indices, einsum("nkh,nhx->nkx", factors, of_keys)), d_q

    d_rows, d_q = map_rows(
        differentiate_queries,
        (flat_indices, *of_queries),
        queries_at_a_time(flat_indices, rows),
        carry=jnp.zeros(rows.shape, wide(kv.dtype)),
    )
    return d_q.reshape(q.shape), d_rows.reshape(kv.shape).astype(kv.dtype), None


def add_to_rows(
    rows: Float[Array, "S X"], indices: Int[Array, "N K"], values: Float[Array, "N K X"]
) -> Float[Array, "S X"]:
    """``rows[index] += value``; nothing for index -1."""
    # Negative indices would wrap around: past the end they are out of bounds and dropped.
    return rows.at[jnp.where(indices >= 0, indices, rows.shape[0])].add(values, mode="drop")


_attend.defvjp(_forward, _backward)
