"""The keys that any of 32 neighbouring queries selected, gathered once for all of them: what TPU kernels share.

A key's row in memory is made of its latent (two bfloat16 numbers a word), its rotary part, perhaps its index key,
and its words of the packed mask, one for each block of 32 queries; one copy brings all of it. The scalar core walks
through the bits of a block's union, starts a copy for every key it finds and so fills one tile while the other is
worked on.

A tile meets all heads of all 32 queries: they stand along the lanes, the keys along the sublanes, so that sums over
keys run over registers and not across lanes, and a key's word, with one bit a query, is the mask.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.blocks import pad_axis, round_up
from pallas_kernels.selection import BITS

LANES = 128
KEYS = 512  # of a tile
COLUMNS = 512  # (query, head) pairs that are attended at a time
VMEM_BYTES = 60 << 20


class Sizes(NamedTuple):
    """Of a call, after padding."""

    batch: int
    blocks: int  # of 32 queries
    heads: int
    latent: int
    rope: int
    keys: int

    @property
    def width(self) -> int:
        """Of a key as attention sees it."""
        return self.latent + self.rope

    @property
    def columns(self) -> int:
        """(query, head) pairs of a block."""
        return BITS * self.heads

    @property
    def chunk(self) -> int:
        """Those worked on at a time."""
        return min(COLUMNS, self.columns)

    @property
    def row_words(self) -> int:
        """Of a key in memory."""
        return round_up(self.latent // 2 + self.rope + self.blocks, LANES)


class Operands(NamedTuple):
    """Queries and keys as the kernels read them, in bfloat16."""

    q: Float[Array, "B T*H X"]
    rows: Int[Array, "B S Y"]
    union: Int[Array, "B I 1 S/32"]


def prepare(
    q: Array, kv: Array, selected: UInt32[Array, "B W S"], latent_dim: int, blocks_multiple: int = 1
) -> tuple[Operands, Sizes]:
    """Pads everything to whole tiles with what nobody selected, and packs the keys."""
    q = pad_queries(pad_features(q, latent_dim).astype(jnp.bfloat16), blocks_multiple)
    kv = pad_features(pad_axis(kv, 1, BITS), latent_dim).astype(jnp.bfloat16)
    latent = round_up(latent_dim, 2 * LANES)
    sizes = Sizes(q.shape[0], q.shape[1] // BITS, q.shape[2], latent, q.shape[3] - latent, kv.shape[1])
    missing_blocks = sizes.blocks - selected.shape[1]
    selected = pad_axis(jnp.pad(selected, [(0, 0), (0, missing_blocks), (0, 0)]), 2, BITS)
    q = q.reshape(sizes.batch, sizes.blocks * sizes.columns, sizes.width)
    return Operands(q, _rows(kv, selected, sizes), _union(selected)), sizes


def pad_queries(x: Float[Array, "B T H ..."], blocks_multiple: int = 1) -> Array:
    """Whole blocks of queries, and as many heads as make whole rows of lanes of a block."""
    return pad_axis(pad_axis(x, 2, LANES // BITS), 1, blocks_multiple * BITS)


def pad_features(x: Array, latent_dim: int) -> Array:
    """Latent and rotary part each in whole rows of lanes, with zeros."""
    c, r = x[..., :latent_dim], x[..., latent_dim:]
    return jnp.concatenate([pad_axis(c, -1, 2 * LANES), pad_axis(r, -1, LANES // 2)], axis=-1)


def _rows(kv: Array, selected: Array, sizes: Sizes) -> Int[Array, "B S Y"]:
    """Words of each key: latent (its halves paired), rotary part in the upper halves, selection of every block."""
    halves = jax.lax.bitcast_convert_type(kv, jnp.uint16).astype(jnp.uint32)
    low, high, rope = jnp.split(halves, [sizes.latent // 2, sizes.latent], axis=-1)
    words = jnp.concatenate([low | (high << 16), rope << 16, selected.swapaxes(1, 2)], axis=-1)
    return pad_axis(jax.lax.bitcast_convert_type(words, jnp.int32), 2, LANES)


def _union(selected: UInt32[Array, "B W S"]) -> Int[Array, "B W 1 S/32"]:
    """One bit a key: whether any query of the block selected it."""
    batch, blocks, keys = selected.shape
    used = (selected != 0).astype(jnp.uint32).reshape(batch, blocks, 1, keys // BITS, BITS)
    bits = jnp.sum(used << jnp.arange(BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.int32)


def for_each_key(
    union, first_word: Int[Array, ""], visit: Callable[[Array, Array], None]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """``visit(key, place in the tile)`` for the keys of whole words, as long as a tile has room for one more word.

    Returns the first word that is left and the number of keys.
    """

    def next_word(state):
        word, count = state

        def next_bit(state):
            bits, count = state
            lowest = bits & -bits
            visit(word * BITS + 31 - jax.lax.clz(lowest), count)
            return bits ^ lowest, count + 1

        return word + 1, jax.lax.while_loop(lambda s: s[0] != 0, next_bit, (union[0, 0, 0, word], count))[1]

    def has_room(state):
        word, count = state
        return (word < union.shape[-1]) & (count <= KEYS - BITS)

    return jax.lax.while_loop(has_room, next_word, (first_word, jnp.int32(0)))


def wait_for_rows(rows, tile, semaphore, count: Int[Array, ""]) -> None:
    """Until ``count`` copies of rows are done: in as many steps as the number has bits."""
    size = KEYS
    while size:

        @pl.when((count & size) != 0)
        def _(size=size):
            pltpu.make_async_copy(rows.at[pl.ds(0, size)], tile.at[pl.ds(0, size)], semaphore).wait()

        size //= 2


def unpack(tile, count: Int[Array, ""], block: Int[Array, ""], sizes: Sizes, keys, words) -> None:
    """The matrix of a tile's keys, and their words; rows behind the last are zero and nobody's."""
    filled = jax.lax.broadcasted_iota(jnp.int32, (KEYS, 1), 0) < count

    def upper_half(word):
        return jax.lax.bitcast_convert_type(word & jnp.int32(-65536), jnp.float32).astype(keys.dtype)

    half = sizes.latent // 2
    pairs = jnp.where(filled, tile[:, :half], 0)
    keys[:, :half] = upper_half(pairs << 16)
    keys[:, half : 2 * half] = upper_half(pairs)
    rest = jnp.where(filled, tile[:, half:], 0)
    keys[:, 2 * half :] = upper_half(rest[:, : sizes.rope])
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, rest.shape[1]), 1)
    words[...] = jnp.sum(jnp.where(lane == sizes.rope + block, rest, 0), axis=1, keepdims=True)


def columns_of(chunk: Int[Array, ""], sizes: Sizes):
    """The columns of a chunk, as an index."""
    return pl.ds(pl.multiple_of(chunk * sizes.chunk, sizes.chunk), sizes.chunk)


def is_member(words, chunk: Int[Array, ""], sizes: Sizes) -> Bool[Array, "K N"]:
    """Which of the tile's keys each (query, head) of a chunk selected: the query's bit of the key's word."""
    column = chunk * sizes.chunk + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.chunk), 1)
    return (words[...] & (1 << column // sizes.heads)) != 0


def product(a: Array, b: Array, contract_a: int, contract_b: int) -> Float[Array, "M N"]:
    """A matrix product with float32 accumulation."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
