"""Sparse multi-head latent attention: every query attends to its own list of keys."""

from jaxtyping import Array, Float, Int

from pallas_kernels.platform import choose
from pallas_kernels.sparse_mla import reference


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    indices: Int[Array, "B T K"],
    *,
    latent_dim: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """``o[t, h] = Σ_s softmax_s(scale · q[t, h] · kv[s]) kv[s, :latent_dim]`` over ``s`` in ``indices[t]``.

    All heads share one key-value row a token: the latent (C = ``latent_dim``) followed by the rotary key (R).
    Index -1 is no key; a row of -1 gets o = 0 and lse = -inf. Indices must not repeat within a row. Only the
    listed pairs are computed. Returns o in the dtype of ``kv`` and the float32 log-sum-exp; differentiable in
    ``q`` and ``kv``.

    Source: V3.2-Exp report §1 (MQA form), V2 report §2.1.3 (absorbed weights).
    """
    chosen = choose("sparse_mla", implementation, {"reference": reference.sparse_mla})
    return chosen(q, kv, indices, latent_dim=latent_dim, scale=scale)
