"""Sparse multi-head latent attention: every query attends to its own list of keys."""

from pallas_kernels import checks
from pallas_kernels.platform import choose
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.sparse_mla import gpu, reference, tpu


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    selection: Int[Array, "B T K"] | UInt32[Array, "B W S"],
    *,
    latent_dim: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """``o[t, h] = Σ_s softmax_s(scale · q[t, h] · kv[s]) kv[s, :latent_dim]`` over the selected ``s``.

    All heads share one key-value row a token: the latent (C = ``latent_dim``) followed by the rotary key (R).
    The selection is a list or a packed mask, as ``topk.select`` gives it: the reference and the GPU read lists,
    the TPU masks. Indices must not repeat within a row (``platform.debug`` looks). A query that selected nothing gets
    o = 0 and lse = -inf. Only selected pairs are computed, or little more. Returns o in the dtype of ``kv`` and the
    float32 log-sum-exp; differentiable in ``q`` and ``kv``. TPUs multiply in bfloat16 whatever the dtype.

    Raises UnsupportedError for arguments that do not fit.

    Source: V3.2-Exp report §1 (MQA form), V2 report §2.1.3 (absorbed weights).
    """
    available = {"reference": reference.sparse_mla, "tpu": tpu.sparse_mla, "gpu": gpu.sparse_mla}
    chosen = choose("sparse_mla", implementation, available)
    checks.shapes("sparse_mla", {"q": (q, "B T H X"), "kv": (kv, "B S X")})
    checks.alike("sparse_mla", {"q": q, "kv": kv})
    checks.floats("sparse_mla", {"q": q, "kv": kv}, kernel=chosen is not reference.sparse_mla)
    latent_dim = checks.latent_dim_within("sparse_mla", latent_dim, q.shape[-1])
    if chosen is gpu.sparse_mla:
        checks.rows_fit_gpu("sparse_mla", latent_dim, kv)
    selection = checks.selection_of("sparse_mla", selection, q.shape[0], q.shape[1], kv.shape[1])
    scale = checks.factor("sparse_mla", "scale", scale)
    return chosen(q, kv, selection, latent_dim=latent_dim, scale=scale)
