"""The contract of sparse attention, in plain jnp: gather, then attend."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.accumulate import einsum
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import require_list
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.softmax import exp_minus, output_delta, sum_exp


def gather_rows(rows: Float[Array, "B S X"], indices: Int[Array, "B T K"]) -> Float[Array, "B T K X"]:
    """The rows that each query selected; index -1 gives row 0, for the caller to mask."""
    safe = jnp.maximum(indices, 0)
    return jax.vmap(lambda r, i: r.at[i].get(mode="promise_in_bounds"))(rows, safe)


def selected_scores(
    q: Float[Array, "B T H X"], selected: Float[Array, "B T K X"], indices: Int[Array, "B T K"], scale: float
) -> Float[Array, "B T H K"]:
    """``scale · q · kv`` in float32 for the gathered rows, -inf where the index is -1."""
    scores = einsum("bthx,btkx->bthk", q, selected)
    return jnp.where(indices[:, :, None] >= 0, scores * scale, -jnp.inf)


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.sparse_mla``. The gathered rows of all queries exist at once: call it on blocks of queries."""
    require_list("sparse_mla", indices)
    return _attend(q, kv, indices, latent_dim, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: Array, kv: Array, indices: Array, latent_dim: int, scale: float) -> tuple[Array, Array]:
    return _gather_and_attend(q, kv, indices, latent_dim, scale)


def _gather_and_attend(
    q: Array, kv: Array, indices: Array, latent_dim: int, scale: float
) -> tuple[Array, Array]:
    selected = gather_rows(kv, indices)
    exponentials, total, lse = sum_exp(selected_scores(q, selected, indices, scale))
    latents = selected[..., :latent_dim]
    o = einsum("bthk,btkc->bthc", exponentials.astype(kv.dtype), latents)
    return (o / total[..., None]).astype(kv.dtype), lse


def _forward(q, kv, indices, latent_dim, scale):
    o, lse = _gather_and_attend(q, kv, indices, latent_dim, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, kv, indices, o, lse)


def _backward(latent_dim, scale, residuals, gradients):
    q, kv, indices, o, lse = residuals
    d_o, d_lse = gradients
    selected = gather_rows(kv, indices)
    p = exp_minus(selected_scores(q, selected, indices, scale), lse)
    delta = output_delta(o, d_o, d_lse)
    d_p = einsum("bthc,btkc->bthk", d_o, selected[..., :latent_dim])
    d_scores = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
    d_q = einsum("bthk,btkx->bthx", d_scores, selected)
    d_rows = einsum("bthk,bthx->btkx", d_scores, q)
    d_latents = einsum("bthk,bthc->btkc", p.astype(d_o.dtype), d_o)
    d_rows = d_rows.at[..., :latent_dim].add(d_latents)
    return d_q.astype(q.dtype), _scatter_add(d_rows, indices, kv), None


def _scatter_add(d_rows: Float[Array, "B T K X"], indices: Int[Array, "B T K"], kv: Float[Array, "B S X"]):
    """Each row's gradient added to the row of ``kv`` it came from; -1 is dropped. Float32 accumulation."""
    # Negative indices would wrap around: past the end they are out of bounds and dropped.
    target = jnp.where(indices >= 0, indices, kv.shape[1])

    def add(d, i):
        zeros = jnp.zeros(kv.shape[1:], d.dtype)
        return zeros.at[i].add(d, mode="drop")

    return jax.vmap(add)(d_rows, target).astype(kv.dtype)


_attend.defvjp(_forward, _backward)
