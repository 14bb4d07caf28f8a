"""The paged cache of a layer: what a token leaves behind, in bfloat16 or in e4m3 with scales.

Tokens lie in pages of G; a page table int32 [B, M] says which pages a sequence has, in order: token s of sequence b
is in page ``page_table[b, s // G]``, at place ``s % G``. Sequences may share pages. An entry past a sequence's end
may hold anything.

In e4m3 a latent has a float32 scale for each 128 features, ``max(|x|) / 448``, and stands for number times scale
rounded to bfloat16; its rotary part stays in bfloat16. An index key has one scale, a power of two as in the released
indexer: values that are on that grid are kept exactly.

Two layouts; bytes a token of the released sizes (latent 512, rotary 64, index key 128):

- ``Cache``: an array for each part. CPU and GPU; 1,408 in bfloat16, 788 in e4m3 (656 and 132).
- ``PackedCache``: latent, rotary part and scales of a token are one row of 32-bit words, which one copy brings into a
  TPU's memory; a multiple of 128 words. 1,792 in bfloat16, 1,160 in e4m3 with pages of 64 (1,024 and 136).

Widths that a platform's kernels do not take are padded with zeros when the cache is made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import LANES, pad_axis, power_of_two, round_up
from pallas_kernels.platform import UnsupportedError, choose
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.words import halves, paired, upper_half

E4M3 = jnp.float8_e4m3fn
GROUP = 128  # latents that share a scale
_MOST = 448.0  # of e4m3
_LEAST_INDEX = 1e-4  # what the released indexer takes for the highest value, at least


class Cache(NamedTuple):
    """An array for each part of a token; scales are None unless the dtype is e4m3."""

    latent: Float[Array, "P G C"]
    rope: Float[Array, "P G R"]
    index_key: Float[Array, "P G J"]
    latent_scale: Float[Array, "P G C/128"] | None = None
    index_scale: Float[Array, "P G"] | None = None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.index_key.shape[1]


class PackedCache(NamedTuple):
    """Rows of words for attention, index keys apart; the scale is None unless the dtype is e4m3."""

    rows: Int[Array, "P G Y"]
    index_key: Float[Array, "P G J"]
    index_scale: Float[Array, "P G"] | None = None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.index_key.shape[1]


class Widths(NamedTuple):
    """Of the parts of a token in a packed row; latents are padded to whole registers of words."""

    latent: int
    rope: int
    in_e4m3: bool

    @property
    def latent_words(self) -> int:
        """Words of the latent: two bfloat16 or four e4m3 numbers in each."""
        return self.latent // (4 if self.in_e4m3 else 2)

    @property
    def scales(self) -> int:
        """One for each 128 latents."""
        return self.latent // GROUP if self.in_e4m3 else 0

    @property
    def row_words(self) -> int:
        """Of a token."""
        return round_up(self.latent_words + self.rope + self.scales, LANES)


def widths_of(latent_dim: int, rope_dim: int, in_e4m3: bool) -> Widths:
    """The padded widths of a packed row."""
    numbers = 4 if in_e4m3 else 2
    return Widths(round_up(latent_dim, numbers * LANES), round_up(rope_dim, LANES // 2), in_e4m3)


def empty(
    pages: int,
    page_size: int,
    *,
    latent_dim: int,
    rope_dim: int,
    index_dim: int,
    dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Cache | PackedCache:
    """A cache of zeros in the layout of the platform; ``dtype`` is bfloat16, float8_e4m3fn or, on CPUs, float32.

    Raises UnsupportedError for a dtype or a page size that the platform's kernels do not read.
    """
    dtype, available = jnp.dtype(dtype), {"reference": _empty, "gpu": _empty_gpu, "tpu": _empty_packed}
    allowed = [jnp.dtype(jnp.bfloat16), jnp.dtype(E4M3)]
    make = choose("decode cache", implementation, available)
    if make is _empty:
        allowed.append(jnp.dtype(jnp.float32))
    if dtype not in allowed:
        names = ", ".join(d.name for d in allowed)
        raise UnsupportedError(f"decode cache: dtype {dtype.name} was given, and it is one of {names}")
    return make(pages, page_size, latent_dim, rope_dim, index_dim, dtype)


def _empty(pages: int, page_size: int, latent: int, rope: int, index: int, dtype) -> Cache:
    size = (pages, page_size)
    if dtype != E4M3:
        return Cache(*(jnp.zeros((*size, width), dtype) for width in (latent, rope, index)))
    if latent > GROUP:
        latent = round_up(latent, GROUP)
    return Cache(
        jnp.zeros((*size, latent), E4M3),
        jnp.zeros((*size, rope), jnp.bfloat16),
        jnp.zeros((*size, index), E4M3),
        jnp.ones((*size, -(-latent // GROUP)), jnp.float32),
        jnp.ones(size, jnp.float32),
    )


def _empty_gpu(pages: int, page_size: int, latent: int, rope: int, index: int, dtype) -> Cache:
    return _empty(pages, page_size, power_of_two(latent), power_of_two(rope), power_of_two(index), dtype)


def _empty_packed(pages: int, page_size: int, latent: int, rope: int, index: int, dtype) -> PackedCache:
    if page_size < 32 or page_size & (page_size - 1):
        raise UnsupportedError(
            f"decode cache: pages of {page_size} tokens were given, and TPU kernels read pages of 32, 64, 128 and so on"
        )
    widths, in_e4m3 = widths_of(latent, rope, dtype == E4M3), dtype == E4M3
    return PackedCache(
        jnp.zeros((pages, page_size, widths.row_words), jnp.int32),
        jnp.zeros((pages, page_size, round_up(index, LANES)), dtype),
        jnp.ones((pages, page_size), jnp.float32) if in_e4m3 else None,
    )


def put(
    cache: Cache | PackedCache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
    c: Float[Array, "B T C"],
    k_pe: Float[Array, "B T R"],
    index_key: Float[Array, "B T J"],
) -> Cache | PackedCache:
    """See ``api.write``."""
    page_size = cache.page_size
    page = jnp.take_along_axis(page_table, jnp.maximum(number, 0) // page_size, axis=1)
    # Negative indices would wrap around: past the end they are out of bounds and dropped.
    page = jnp.where((number >= 0) & (page >= 0), page, cache.index_key.shape[0])
    place = jnp.maximum(number, 0) % page_size

    def with_new(array: Array, values: Array) -> Array:
        values = pad_axis(values, 2, array.shape[2]) if array.ndim == 3 else values
        return array.at[page, place].set(values.astype(array.dtype), mode="drop")

    if isinstance(cache, PackedCache):
        rows = _packed_rows(c, k_pe, widths_of(c.shape[-1], k_pe.shape[-1], cache.index_scale is not None))
        if cache.index_scale is None:
            return PackedCache(with_new(cache.rows, rows), with_new(cache.index_key, index_key))
        numbers, scale = quantise_index_key(index_key)
        scales = with_new(cache.index_scale, scale)
        return PackedCache(with_new(cache.rows, rows), with_new(cache.index_key, numbers), scales)
    if cache.latent_scale is None or cache.index_scale is None:
        return Cache(
            with_new(cache.latent, c), with_new(cache.rope, k_pe), with_new(cache.index_key, index_key)
        )
    latent, latent_scale = quantise_latent(pad_axis(c, -1, cache.latent.shape[-1]))
    numbers, scale = quantise_index_key(index_key)
    return Cache(
        with_new(cache.latent, latent),
        with_new(cache.rope, k_pe),
        with_new(cache.index_key, numbers),
        with_new(cache.latent_scale, latent_scale),
        with_new(cache.index_scale, scale),
    )


def quantise_latent(c: Float[Array, "*B C"]) -> tuple[Float[Array, "*B C"], Float[Array, "*B C/128"]]:
    """e4m3 numbers and float32 scales, ``max(|x|) / 448`` of each 128 (of all, where there are fewer)."""
    groups = c.astype(jnp.float32).reshape(*c.shape[:-1], -1, min(GROUP, c.shape[-1]))
    scale = jnp.max(jnp.abs(groups), axis=-1) / _MOST
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    numbers = jnp.clip(groups / scale[..., None], -_MOST, _MOST)
    return numbers.reshape(c.shape).astype(E4M3), scale


def quantise_index_key(k: Float[Array, "*B J"]) -> tuple[Float[Array, "*B J"], Float[Array, "*B"]]:
    """e4m3 numbers and one float32 scale, ``2^⌈log₂(max(|x|, 1e-4) / 448)⌉``.

    Source: V3.2-Exp released inference code (``act_quant`` with ue8m0 scales).
    """
    k = k.astype(jnp.float32)
    bound = jnp.maximum(jnp.max(jnp.abs(k), axis=-1), _LEAST_INDEX) / _MOST
    bits = jax.lax.bitcast_convert_type(bound, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return jnp.clip(k / scale[..., None], -_MOST, _MOST).astype(E4M3), scale


def _packed_rows(c: Array, k_pe: Array, widths: Widths) -> Int[Array, "B T Y"]:
    """Words of each token: latent, rotary part in the upper halves, scales.

    Byte i of word j of an e4m3 latent is feature ``i · C/4 + j``, so that a register of words gives four of features.
    """
    c = pad_axis(c, -1, widths.latent)
    words, scales = paired(c.astype(jnp.bfloat16)), None
    if widths.in_e4m3:
        numbers, scale = quantise_latent(c)
        octets = jax.lax.bitcast_convert_type(numbers, jnp.uint8).astype(jnp.uint32)
        octets = octets.reshape(*octets.shape[:-1], 4, widths.latent_words)
        words = jnp.sum(octets << (8 * jnp.arange(4, dtype=jnp.uint32))[:, None], axis=-2, dtype=jnp.uint32)
        scales = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    rope = halves(pad_axis(k_pe, -1, widths.rope).astype(jnp.bfloat16)) << 16
    parts = [words, rope] if scales is None else [words, rope, scales]
    return pad_axis(jax.lax.bitcast_convert_type(jnp.concatenate(parts, axis=-1), jnp.int32), 2, LANES)


def read(
    cache: Cache | PackedCache,
    page_table: Int[Array, "B M"],
    *,
    latent_dim: int,
    rope_dim: int,
    index_dim: int,
) -> tuple[Float[Array, "B S C+R"], Float[Array, "B S J"]]:
    """Everything in the pages of each sequence, in float32: rows for attention and index keys. To look at, and slow."""
    batch = page_table.shape[0]

    def pages(array: Array) -> Array:
        found = array[jnp.maximum(page_table, 0)]
        return found.reshape(batch, -1, *array.shape[2:])

    index_key = pages(cache.index_key).astype(jnp.float32)
    if cache.index_scale is not None:
        index_key *= cache.index_scale[jnp.maximum(page_table, 0)].reshape(batch, -1, 1)
    if isinstance(cache, PackedCache):
        widths = widths_of(latent_dim, rope_dim, cache.index_scale is not None)
        latent, rope = _unpacked_rows(pages(cache.rows), widths)
    else:
        latent, rope = pages(cache.latent), pages(cache.rope)
        if cache.latent_scale is not None:
            latent = dequantise_latent(latent, pages(cache.latent_scale))
    kv = jnp.concatenate([latent[..., :latent_dim], rope[..., :rope_dim]], -1)
    return kv.astype(jnp.float32), index_key[..., :index_dim]


def dequantise_latent(numbers: Float[Array, "*B C"], scale: Float[Array, "*B C/128"]) -> Float[Array, "*B C"]:
    """The bfloat16 latents that numbers and scales stand for."""
    groups = numbers.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    return groups.reshape(numbers.shape).astype(jnp.bfloat16)


def rows_of(
    page_table: Int[Array, "B M"], indices: Int[Array, "B T K"], page_size: int
) -> Int[Array, "B T K"]:
    """Where tokens of each sequence lie among all pages' rows.

    For -1, the complement ``~row`` of a row that the same query selected: what is read in vain must not be another
    sequence's, where a NaN may be.
    """
    safe = jnp.maximum(indices, 0)
    page = jax.vmap(lambda table, i: table[i])(page_table, safe // page_size)
    rows = jnp.where(indices >= 0, page * page_size + safe % page_size, -1)
    own = jnp.maximum(jnp.max(rows, axis=-1, keepdims=True), 0)
    return jnp.where(rows >= 0, rows, ~own)


def readable(rows: Int[Array, "*B K"]) -> Int[Array, "*B K"]:
    """The rows of ``rows_of``, whether they hold a selected token or not."""
    return jnp.where(rows >= 0, rows, ~rows)


def _unpacked_rows(rows: Int[Array, "B S Y"], widths: Widths) -> tuple[Array, Array]:
    """Latents and rotary parts in bfloat16."""
    count, rope_end = widths.latent_words, widths.latent_words + widths.rope
    words, rope = rows[..., :count], upper_half(rows[..., count:rope_end])
    if not widths.in_e4m3:
        return jnp.concatenate([upper_half(words << 16), upper_half(words)], -1), rope
    octets = (words[..., None, :] >> (8 * jnp.arange(4, dtype=jnp.int32))[:, None]) & 255
    numbers = jax.lax.bitcast_convert_type(octets.astype(jnp.uint8), E4M3).reshape(*words.shape[:-1], -1)
    scale = jax.lax.bitcast_convert_type(rows[..., rope_end : rope_end + widths.scales], jnp.float32)
    return dequantise_latent(numbers, scale), rope
