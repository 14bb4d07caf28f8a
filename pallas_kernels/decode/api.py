"""Decoding: index scores and sparse attention of a sequence's next tokens, over its pages."""

import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.decode import gpu, reference, tpu
from pallas_kernels.decode.cache import E4M3, Cache, PackedCache, put
from pallas_kernels.decode.fits import (
    check_cache,
    check_call,
    check_rows,
    check_width,
    pages_of,
    pages_within,
)
from pallas_kernels.platform import choose, debugging
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk import gpu as topk_gpu
from pallas_kernels.topk import reference as topk_reference


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

    ``paged_index_scores``, selection, ``paged_sparse_mla``. Their own rows must be in the cache: ``write``
    comes first.

    Raises UnsupportedError for arguments that do not fit.

    Source: V3.2-Exp report §1.
    """
    op, k = "decode_attention", checks.positive("decode_attention", "k", k)
    index = {"index_q": (index_q, "B T N J"), "index_w": (index_w, "B T N"), "number": (number, "B T")}
    checks.shapes(op, {"q": (q, "B T H X"), **index, "page_table": (page_table, "B M")})
    scores = paged_index_scores(index_q, index_w, cache, page_table, number, implementation=implementation)
    available = {"reference": topk_reference.topk_indices, "tpu": tpu.select, "gpu": topk_gpu.topk_indices}
    selection = choose(op, implementation, available)(scores, min(k, scores.shape[-1]))
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
    op, kernel = "paged_index_scores", chosen is not reference.paged_index_scores
    queries = {"q": (q, "B T N J"), "w": (w, "B T N"), "number": (number, "B T")}
    check_call(op, queries, cache, page_table, PackedCache if chosen is tpu.paged_index_scores else Cache)
    checks.floats(op, {"w": w} if q.dtype == E4M3 else {"q": q, "w": w}, kernel=kernel)
    checks.integers(op, {"number": queries["number"]})
    check_width(op, "q", q.shape[-1], cache.index_key.shape[-1])
    tokens = page_table.shape[1] * cache.page_size
    number = checks.within(op, "number", number, -1, tokens)
    if debugging():
        used = cache.page_size * jnp.arange(page_table.shape[1]) <= jnp.max(number, axis=1, keepdims=True)
        page_table = pages_within(op, page_table, used, cache)
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
    float32 log-sum-exp; not differentiable. Kernels multiply in bfloat16, which is what their caches hold.

    Raises UnsupportedError for more than 8 queries a sequence, and for a cache of another platform's layout.

    Source: V3.2-Exp report §1 (MQA form), V2 report §2.1.3 (absorbed weights).
    """
    available = {
        "reference": reference.paged_sparse_mla,
        "tpu": tpu.paged_sparse_mla,
        "gpu": gpu.paged_sparse_mla,
    }
    chosen = choose("paged_sparse_mla", implementation, available)
    op, kernel = "paged_sparse_mla", chosen is not reference.paged_sparse_mla
    check_call(
        op, {"q": (q, "B T H X")}, cache, page_table, PackedCache if chosen is tpu.paged_sparse_mla else Cache
    )
    checks.floats(op, {"q": q}, kernel=kernel)
    latent_dim = checks.latent_dim_within(op, latent_dim, q.shape[-1])
    scale = checks.factor(op, "scale", scale)
    check_rows(op, latent_dim, q.shape[-1] - latent_dim, cache)
    if chosen is gpu.paged_sparse_mla:
        checks.rows_fit_gpu(op, latent_dim, q.astype(jnp.bfloat16))
    tokens = page_table.shape[1] * cache.page_size
    selection = checks.selection_of(op, selection, q.shape[0], q.shape[1], tokens)
    if debugging():
        page_table = pages_within(op, page_table, pages_of(selection, page_table, cache), cache)
    return chosen(q, cache, page_table, selection, latent_dim=latent_dim, scale=scale)


def write(
    cache: Cache | PackedCache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
    c: Float[Array, "B T C"],
    k_pe: Float[Array, "B T R"],
    index_key: Float[Array, "B T J"],
) -> Cache | PackedCache:
    """The cache, as ``cache.empty`` made it, with new tokens in it; quantised where it is e4m3.

    ``number`` is a token's place in its sequence, and -1 for no token: nothing is written for it, nor for a page that
    is not there (``platform.debug`` looks).

    Raises UnsupportedError for arguments that do not fit.
    """
    op, tokens = "write", page_table.shape[-1] * cache.page_size
    places = {"page_table": (page_table, "B M"), "number": (number, "B T")}
    rows = {"c": (c, "B T L"), "k_pe": (k_pe, "B T O"), "index_key": (index_key, "B T J")}
    check_cache(op, {**places, **rows}, cache)
    checks.integers(op, places)
    check_rows(op, c.shape[-1], k_pe.shape[-1], cache)
    check_width(op, "index_key", index_key.shape[-1], cache.index_key.shape[-1])
    number = checks.within(op, "number", number, -1, tokens)
    if debugging():
        page_table = pages_within(op, page_table, pages_of(number, page_table, cache), cache)
    return put(cache, page_table, number, c, k_pe, index_key)
