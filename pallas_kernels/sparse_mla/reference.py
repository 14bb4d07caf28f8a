"""The contract of sparse attention, in plain jnp: gather, then attend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.softmax import masked_softmax


def gather_rows(rows: Float[Array, "B S X"], indices: Int[Array, "B T K"]) -> Float[Array, "B T K X"]:
    """The rows that each query selected; index -1 gives row 0, for the caller to mask."""
    safe = jnp.maximum(indices, 0)
    return jax.vmap(lambda r, i: r.at[i].get(mode="promise_in_bounds"))(rows, safe)


def selected_scores(
    q: Float[Array, "B T H X"], selected: Float[Array, "B T K X"], indices: Int[Array, "B T K"], scale: float
) -> Float[Array, "B T H K"]:
    """``scale · q · kv`` in float32 for the gathered rows, -inf where the index is -1."""
    scores = jnp.einsum("bthx,btkx->bthk", q * scale, selected, preferred_element_type=jnp.float32)
    return jnp.where(indices[:, :, None] >= 0, scores, -jnp.inf)


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.sparse_mla``. The gathered rows of all queries exist at once: call it on blocks of queries."""
    selected = gather_rows(kv, indices)
    weights, lse = masked_softmax(selected_scores(q, selected, indices, scale))
    latents = selected[..., :latent_dim]
    o = jnp.einsum("bthk,btkc->bthc", weights.astype(kv.dtype), latents, preferred_element_type=jnp.float32)
    return o.astype(kv.dtype), lse
