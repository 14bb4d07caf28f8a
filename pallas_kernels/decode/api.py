"""Decoding: index scores and sparse attention of a sequence's next tokens, over its pages."""

from pallas_kernels.decode import gpu, reference, tpu
from pallas_kernels.decode.cache import Cache, PackedCache
from pallas_kernels.platform import UnsupportedError, choose, target
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk import gpu as topk_gpu
from pallas_kernels.topk import reference as topk_reference

_MOST_QUERIES = 8  # of a sequence


def decode_attention(
    q: Float[Array, "B T H C+R"],
    index_q: Float[Array, "B T N J"],
    index_w: Float[Array, "B T N"],
    cache: Cache | PackedCache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
    *,
    k: int,
    latent_dim: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Attention of the newest tokens of each sequence to its ``k`` most relevant ones, themselves among them.

    ``paged_index_scores``, selection, ``paged_sparse_mla``. Their own rows must be in the cache: ``cache.write``
    comes first.

    Source: V3.2-Exp report §1.
    """
    scores = paged_index_scores(index_q, index_w, cache, page_table, number, implementation=implementation)
    available = {"reference": topk_reference.topk_indices, "tpu": tpu.select, "gpu": topk_gpu.topk_indices}
    selection = choose("decode_attention", implementation, available)(scores, min(k, scores.shape[-1]))
    return paged_sparse_mla(
        q,
        cache,
        page_table,
        selection,
        latent_dim=latent_dim,
        scale=scale,
        implementation=implementation,
    )


def paged_index_scores(
    q: Float[Array, "B T N J"],
    w: Float[Array, "B T N"],
    cache: Cache | PackedCache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T M*G"]:
    """``I[t, s] = Σ_n w[t, n] · ReLU(q[t, n] · k[s])`` in float32 for the tokens s of a sequence; -inf above its query.

    ``number`` is a query's place in its sequence; -1 is an empty slot, which sees nothing. q is in bfloat16 or e4m3
    (its scale belongs in ``w``); the scales of keys in e4m3 are multiplied in. Pages past a sequence's last query
    are not read.

    Raises UnsupportedError for more than 8 queries a sequence, and for a cache of another platform's layout.

    Source: V3.2-Exp report eq. 1.
    """
    available = {
        "reference": reference.paged_index_scores,
        "tpu": tpu.paged_index_scores,
        "gpu": gpu.paged_index_scores,
    }
    chosen = choose("paged_index_scores", implementation, available)
    _check("paged_index_scores", q, cache, page_table, implementation)
    return chosen(q, w, cache, page_table, number)


def paged_sparse_mla(
    q: Float[Array, "B T H C+R"],
    cache: Cache | PackedCache,
    page_table: Int[Array, "B M"],
    selection: Int[Array, "B T K"] | UInt32[Array, "B 1 M*G"],
    *,
    latent_dim: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """``o[t, h] = Σ_s softmax_s(scale · q[t, h] · kv[s]) kv[s, :latent_dim]`` over the selected tokens s.

    As ``sparse_mla``, with the keys in pages: the reference and the GPU read a selection as a list, the TPU as a
    packed mask. A query that selected nothing gets o = 0 and lse = -inf. Returns o in the dtype of ``q`` and the
    float32 log-sum-exp; not differentiable.

    Raises UnsupportedError for more than 8 queries a sequence, and for a cache of another platform's layout.

    Source: V3.2-Exp report §1 (MQA form), V2 report §2.1.3 (absorbed weights).
    """
    available = {
        "reference": reference.paged_sparse_mla,
        "tpu": tpu.paged_sparse_mla,
        "gpu": gpu.paged_sparse_mla,
    }
    chosen = choose("paged_sparse_mla", implementation, available)
    _check("paged_sparse_mla", q, cache, page_table, implementation)
    return chosen(q, cache, page_table, selection, latent_dim=latent_dim, scale=scale)


def _check(
    op: str, q: Array, cache: Cache | PackedCache, page_table: Array, implementation: str | None
) -> None:
    if q.shape[1] > _MOST_QUERIES:
        raise UnsupportedError(
            f"{op}: {q.shape[1]} queries a sequence were given, and decoding takes at most {_MOST_QUERIES}: give a "
            "longer piece to indexer.api.index_scores and sparse_mla.api.sparse_mla"
        )
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or page_table.dtype != "int32":
        raise UnsupportedError(
            f"{op}: the page table is {page_table.dtype}{list(page_table.shape)}, and it must be int32[{q.shape[0]}, "
            "M], the pages of each sequence in order"
        )
    wanted = PackedCache if (implementation or target()) == "tpu" else Cache
    if not isinstance(cache, wanted):
        raise UnsupportedError(
            f"{op}: this implementation reads a {wanted.__name__}, and it was given a {type(cache).__name__}: make "
            "it with decode.cache.empty where it is used, or name the same implementation there"
        )
