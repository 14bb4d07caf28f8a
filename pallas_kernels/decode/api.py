"""Decoding: index scores and sparse attention of a sequence's next tokens, over its pages."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.blocks import round_up
from pallas_kernels.decode import gpu, reference, tpu
from pallas_kernels.decode.cache import E4M3, GROUP, Cache, PackedCache, widths_of
from pallas_kernels.platform import UnsupportedError, choose, debugging, target
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.topk import gpu as topk_gpu
from pallas_kernels.topk import reference as topk_reference
from pallas_kernels.triton import power_of_two

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
    _check(op, queries, cache, page_table, implementation)
    checks.floats(op, {"w": w} if q.dtype == E4M3 else {"q": q, "w": w}, kernel=kernel)
    checks.integers(op, {"number": queries["number"]})
    _check_width(op, "q", q.shape[-1], cache.index_key.shape[-1])
    tokens = page_table.shape[1] * cache.page_size
    number = checks.within(op, "number", number, -1, tokens)
    if debugging():
        used = cache.page_size * jnp.arange(page_table.shape[1]) <= jnp.max(number, axis=1, keepdims=True)
        page_table = _pages_within(op, page_table, used, cache)
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
    op, kernel = "paged_sparse_mla", chosen is not reference.paged_sparse_mla
    _check(op, {"q": (q, "B T H X")}, cache, page_table, implementation)
    checks.floats(op, {"q": q}, kernel=kernel)
    latent_dim = checks.latent_dim_within(op, latent_dim, q.shape[-1])
    scale = checks.factor(op, "scale", scale)
    _check_rows(op, latent_dim, q.shape[-1] - latent_dim, cache)
    tokens = page_table.shape[1] * cache.page_size
    selection = checks.selection_of(op, selection, q.shape[0], q.shape[1], tokens)
    if debugging():
        page_table = _pages_within(op, page_table, _pages_of(selection, page_table, cache), cache)
    return chosen(q, cache, page_table, selection, latent_dim=latent_dim, scale=scale)


def _check(
    op: str, queries: checks.Named, cache: Cache | PackedCache, page_table: Array, implementation: str | None
) -> None:
    table = {"page_table": (page_table, "B M")}
    checks.shapes(op, {"q": queries["q"], **table})
    given = queries["q"][0].shape[1]
    if given > _MOST_QUERIES:
        raise UnsupportedError(
            f"{op}: {given} queries a sequence were given, and decoding takes at most {_MOST_QUERIES}: give a "
            "longer piece to indexer.api.index_scores and sparse_mla.api.sparse_mla"
        )
    checks.integers(op, table)
    wanted = PackedCache if (implementation or target()) == "tpu" else Cache
    if not isinstance(cache, wanted):
        raise UnsupportedError(
            f"{op}: this implementation reads a {wanted.__name__}, and it was given a {type(cache).__name__}: make "
            "it with decode.cache.empty where it is used, or name the same implementation there"
        )
    checks.shapes(op, {**queries, **table, **_parts_of(cache)})
    _check_dtypes(op, cache)


def _parts_of(cache: Cache | PackedCache) -> dict[str, tuple[Any, str]]:
    of_cache = ("P G C", "P G R", "P G I", "P G c", "P G")
    letters = of_cache if isinstance(cache, Cache) else ("P G Y", "P G I", "P G")
    named = zip(cache._fields, cache, letters, strict=True)
    return {f"cache.{name}": (x, axes) for name, x, axes in named if x is not None or "scale" not in name}


def _check_dtypes(op: str, cache: Cache | PackedCache) -> None:
    dtype = str(cache.index_key.dtype)
    if dtype not in ("bfloat16", "float32", jnp.dtype(E4M3).name):
        raise UnsupportedError(
            f"{op}: cache.index_key is {dtype}, and it should be as decode.cache.empty makes it"
        )
    rope, scale = ("bfloat16", "float32") if cache.index_key.dtype == E4M3 else (dtype, "None")
    wanted = {"latent": dtype, "rope": rope, "rows": "int32", "latent_scale": scale, "index_scale": scale}
    for name, array in cache._asdict().items():
        given = "None" if array is None else str(array.dtype)
        if name in wanted and given != wanted[name]:
            raise UnsupportedError(
                f"{op}: cache.{name} is {given}, and it should be {wanted[name]}, as index_key is {dtype}: make it "
                "with decode.cache.empty"
            )


def _check_rows(op: str, latent_dim: int, rope_dim: int, cache: Cache | PackedCache) -> None:
    if isinstance(cache, Cache):
        _check_width(op, "the latent part of q", latent_dim, cache.latent.shape[-1])
        _check_width(op, "the rotary part of q", rope_dim, cache.rope.shape[-1])
        return
    wanted = widths_of(latent_dim, rope_dim, cache.index_scale is not None).row_words
    if cache.rows.shape[-1] != wanted:
        raise UnsupportedError(
            f"{op}: rows of the cache have {cache.rows.shape[-1]} words, and a latent of {latent_dim} with a rotary "
            f"part of {rope_dim} has {wanted}: make it with decode.cache.empty for these widths"
        )


def _check_width(op: str, name: str, given: int, held: int) -> None:
    """Of a part and of what the cache holds of it, which may be padded as some platform's is."""
    if held not in (given, power_of_two(given), round_up(given, GROUP)):
        raise UnsupportedError(
            f"{op}: {name} is {given} wide, and the cache holds {held}: make it with decode.cache.empty for this width"
        )


def _pages_of(selection: Array, page_table: Array, cache: Cache | PackedCache) -> Bool[Array, "B M"]:
    """Those of which a token is selected."""
    batch, pages = page_table.shape
    if selection.dtype == jnp.uint32:
        return jnp.any(selection.reshape(batch, pages, -1) != 0, axis=-1)
    page = jnp.where(selection >= 0, selection // cache.page_size, pages).reshape(batch, -1)
    return jnp.any(page[..., None] == jnp.arange(pages), axis=1)


def _pages_within(op: str, page_table: Array, used: Array, cache: Cache | PackedCache) -> Int[Array, "B M"]:
    """The page table; within ``platform.debug()`` only if every entry that is used is a page of the cache."""
    pages = cache.index_key.shape[0]

    def sentence(batch: int, place: int, page: int) -> str:
        return f"{op}: page_table[{batch}, {place}] is {page} and in use, and pages are from 0 to {pages - 1}"

    wrong = used & ((page_table < 0) | (page_table >= pages))
    return checks.stop_where(wrong, page_table, sentence, page_table)
