"""What a call of decoding and the cache it is given must have in common."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.blocks import power_of_two, round_up
from pallas_kernels.decode.cache import E4M3, GROUP, Cache, PackedCache, widths_of
from pallas_kernels.platform import UnsupportedError
from pallas_kernels.shapes import Array, Bool, Int

AnyCache = Cache | PackedCache
_MOST_QUERIES = 8  # of a sequence


def check_call(
    op: str,
    queries: checks.Named,
    cache: AnyCache,
    page_table: Array,
    wanted: type[Cache] | type[PackedCache],
) -> None:
    """Raises UnsupportedError unless queries, cache and page table are of the same sequences, in the wanted layout."""
    table = {"page_table": (page_table, "B M")}
    checks.shapes(op, {"q": queries["q"], **table})
    given = queries["q"][0].shape[1]
    if given > _MOST_QUERIES:
        raise UnsupportedError(
            f"{op}: {given} queries a sequence were given, and decoding takes at most {_MOST_QUERIES}: give a "
            "longer piece to indexer.api.index_scores and sparse_mla.api.sparse_mla"
        )
    checks.integers(op, table)
    if not isinstance(cache, wanted):
        raise UnsupportedError(
            f"{op}: this implementation reads a {wanted.__name__}, and it was given a {type(cache).__name__}: make "
            "it with decode.cache.empty where it is used, or name the same implementation there"
        )
    check_cache(op, {**queries, **table}, cache)


def check_cache(op: str, arguments: checks.Named, cache: AnyCache) -> None:
    """Raises UnsupportedError unless the cache is one, and the arguments of one size a letter."""
    checks.shapes(op, {**arguments, **_parts_of(cache)})
    _check_dtypes(op, cache)


def _parts_of(cache: AnyCache) -> dict[str, tuple[Any, str]]:
    of_cache = ("P G C", "P G R", "P G I", "P G c", "P G")
    letters = of_cache if isinstance(cache, Cache) else ("P G Y", "P G I", "P G")
    named = zip(cache._fields, cache, letters, strict=True)
    return {f"cache.{name}": (x, axes) for name, x, axes in named if x is not None or "scale" not in name}


def _check_dtypes(op: str, cache: AnyCache) -> None:
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


def check_rows(op: str, latent_dim: int, rope_dim: int, cache: AnyCache) -> None:
    """Raises UnsupportedError unless rows of the cache are made for these widths."""
    if isinstance(cache, Cache):
        check_width(op, "the latent", latent_dim, cache.latent.shape[-1])
        check_width(op, "the rotary part", rope_dim, cache.rope.shape[-1])
        return
    wanted = widths_of(latent_dim, rope_dim, cache.index_scale is not None).row_words
    if cache.rows.shape[-1] != wanted:
        raise UnsupportedError(
            f"{op}: rows of the cache have {cache.rows.shape[-1]} words, and a latent of {latent_dim} with a rotary "
            f"part of {rope_dim} has {wanted}: make it with decode.cache.empty for these widths"
        )


def check_width(op: str, name: str, given: int, held: int) -> None:
    """Raises UnsupportedError unless a part is as wide as what the cache holds of it, padded as some platform's is."""
    if held not in (given, power_of_two(given), round_up(given, GROUP)):
        raise UnsupportedError(
            f"{op}: {name} is {given} wide, and the cache holds {held}: make it with decode.cache.empty for this width"
        )


def pages_of(selection: Array, page_table: Array, cache: AnyCache) -> Bool[Array, "B M"]:
    """Those of which a token is selected: by a packed mask, or by places in the sequence, -1 being none."""
    batch, pages = page_table.shape
    if selection.dtype == jnp.uint32:
        return jnp.any(selection.reshape(batch, pages, -1) != 0, axis=-1)
    page = jnp.where(selection >= 0, selection // cache.page_size, pages).reshape(batch, -1)
    return jnp.any(page[..., None] == jnp.arange(pages), axis=1)


def pages_within(op: str, page_table: Array, used: Array, cache: AnyCache) -> Int[Array, "B M"]:
    """The page table; within ``platform.debug()`` only if every entry that is used is a page of the cache."""
    pages = cache.index_key.shape[0]

    def sentence(batch: int, place: int, page: int) -> str:
        return f"{op}: page_table[{batch}, {place}] is {page} and in use, and pages are from 0 to {pages - 1}"

    wrong = used & ((page_table < 0) | (page_table >= pages))
    return checks.stop_where(wrong, page_table, sentence, page_table)
