"""The keys that any of 32 neighbouring queries selected, gathered once for all of them: what TPU kernels share.

A key's row in memory is made of its latent (two bfloat16 numbers a word), its rotary part, perhaps its index key,
and its words of the packed mask, one for each block of 32 queries; one copy brings all of it. The scalar core walks
through the bits of a block's union, starts a copy for every key it finds and so fills one tile while the other is
worked on.

A tile meets all heads of all 32 queries: they stand along the lanes, the keys along the sublanes, so that sums over
keys run over registers and not across lanes, and a key's word, with one bit a query, is the mask.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis, round_up
from pallas_kernels.selection import BITS, require_mask
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.words import halves, paired, upper_half

KEYS = 512  # of a tile
COLUMNS = 512  # (query, head) pairs that are worked on at a time, at most
Ref = Any  # a piece of some memory, as a kernel sees it
_VMEM_BYTES = 60 << 20


class Sizes(NamedTuple):
    """Of a call, after padding."""

    batch: int
    blocks: int  # of 32 queries
    heads: int
    latent: int
    rope: int
    keys: int
    index_width: int = 0  # of an index key

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
        return chunk_of(self.columns)

    @property
    def row_words(self) -> int:
        """Of a key in memory."""
        return round_up(self.latent // 2 + self.rope + self.index_width // 2 + self.blocks, LANES)


def chunk_of(columns: int) -> int:
    """Whole rows of lanes that divide all columns, at most COLUMNS of them."""
    return next(n for n in range(COLUMNS, 0, -LANES) if columns % n == 0)


class Operands(NamedTuple):
    """Queries and keys as the kernels read them, in bfloat16."""

    q: Float[Array, "B T*H X"]
    rows: Int[Array, "B S Y"]
    union: Int[Array, "B I 1 S/32"]


def prepare(
    q: Array,
    kv: Array,
    selected: UInt32[Array, "B W S"],
    latent_dim: int,
    blocks_multiple: int = 1,
    index_k: Array | None = None,
) -> tuple[Operands, Sizes]:
    """Pads everything to whole tiles with what nobody selected, and packs the keys.

    Raises UnsupportedError where the selection is no packed mask.
    """
    require_mask("attention over a selection", selected, q.shape[1], kv.shape[1])
    q = pad_queries(pad_features(q, latent_dim).astype(jnp.bfloat16), blocks_multiple)
    kv = pad_features(pad_axis(kv, 1, BITS), latent_dim).astype(jnp.bfloat16)
    latent = round_up(latent_dim, 2 * LANES)
    sizes = Sizes(q.shape[0], q.shape[1] // BITS, q.shape[2], latent, q.shape[3] - latent, kv.shape[1])
    if index_k is not None:
        index_k = pad_axis(pad_axis(index_k, 1, BITS), 2, LANES).astype(jnp.bfloat16)
        sizes = sizes._replace(index_width=index_k.shape[2])
    missing_blocks = sizes.blocks - selected.shape[1]
    selected = pad_axis(jnp.pad(selected, [(0, 0), (0, missing_blocks), (0, 0)]), 2, BITS)
    q = q.reshape(sizes.batch, sizes.blocks * sizes.columns, sizes.width)
    return Operands(q, _rows(kv, index_k, selected, sizes), _union(selected)), sizes


def pad_queries(x: Float[Array, "B T H ..."], blocks_multiple: int = 1) -> Array:
    """Whole blocks of queries, and as many heads as make whole rows of lanes of a block."""
    return pad_axis(pad_axis(x, 2, LANES // BITS), 1, blocks_multiple * BITS)


def pad_features(x: Array, latent_dim: int) -> Array:
    """Latent and rotary part each in whole rows of lanes, with zeros."""
    c, r = x[..., :latent_dim], x[..., latent_dim:]
    return jnp.concatenate([pad_axis(c, -1, 2 * LANES), pad_axis(r, -1, LANES // 2)], axis=-1)


def _rows(kv: Array, index_k: Array | None, selected: Array, sizes: Sizes) -> Int[Array, "B S Y"]:
    """Words of each key: latent, rotary part in the upper halves, index key, selection of every block."""
    rope = halves(kv[..., sizes.latent :]) << 16
    words = [paired(kv[..., : sizes.latent]), rope, selected.swapaxes(1, 2)]
    if index_k is not None:
        words.insert(2, paired(index_k))
    return pad_axis(jax.lax.bitcast_convert_type(jnp.concatenate(words, axis=-1), jnp.int32), 2, LANES)


def _union(selected: UInt32[Array, "B W S"]) -> Int[Array, "B W 1 S/32"]:
    """One bit a key: whether any query of the block selected it."""
    batch, blocks, keys = selected.shape
    used = (selected != 0).astype(jnp.uint32).reshape(batch, blocks, 1, keys // BITS, BITS)
    bits = jnp.sum(used << jnp.arange(BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.int32)


class Gather(NamedTuple):
    """Rows of the keys of a union, on their way into one of two tiles."""

    union: Ref  # of the block, in scalar memory
    rows: Ref  # [S, Y] of the sequence
    tiles: Ref  # [2, KEYS, Y]
    arrived: Ref  # a semaphore for each


class Scatter(NamedTuple):
    """Sums of all blocks [S, X] that a block adds to, and what it adds for the keys of a tile."""

    sums: Ref
    added: Ref  # [KEYS, X]
    tiles: Ref  # [2, KEYS, X]
    read: Ref
    written: Ref

    @staticmethod
    def scratch(width: int) -> list:
        """All but the sums, as a kernel asks for them."""
        return [
            pltpu.VMEM((KEYS, width), jnp.float32),
            pltpu.VMEM((2, KEYS, width), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ]

    def add(
        self, union: Ref, first_word: Int[Array, ""], buffer: Int[Array, ""], count: Int[Array, ""]
    ) -> None:
        """Adds to a tile of sums and starts to write it back."""

        def write(key, place):
            _copy(self.tiles.at[buffer], place, self.sums, key, self.written.at[buffer])

        wait_for_rows(self.tiles.at[buffer], self.read.at[buffer], count)
        self.tiles[buffer] += self.added[...]
        _for_each_key(union, first_word, write)

    def wait_for_writing(self, buffer: Int[Array, ""], count: Int[Array, ""]) -> None:
        """Until the tile may be used again."""
        wait_for_rows(self.tiles.at[buffer], self.written.at[buffer], count)


def over_tiles(
    gather: Gather, work: Callable[[Ref, Int[Array, ""]], None], scatter: Scatter | None = None
) -> None:
    """``work(tile, count)`` for one tile of the union after another, the next one's rows on their way meanwhile.

    With ``scatter``, what work leaves in ``scatter.added`` is added to the sums of the tile's keys.
    """

    def fetch(first_word, buffer):
        def copy(key, place):
            _copy(gather.rows, key, gather.tiles.at[buffer], place, gather.arrived.at[buffer])
            if scatter:
                _copy(scatter.sums, key, scatter.tiles.at[buffer], place, scatter.read.at[buffer])

        return _for_each_key(gather.union, first_word, copy)

    def step(state):
        buffer, count, first_word, next_word, being_written = state
        if scatter:
            scatter.wait_for_writing(1 - buffer, being_written)
        word_after, next_count = fetch(next_word, 1 - buffer)
        wait_for_rows(gather.tiles.at[buffer], gather.arrived.at[buffer], count)
        work(gather.tiles.at[buffer], count)
        if scatter:
            scatter.add(gather.union, first_word, buffer, count)
        return 1 - buffer, next_count, next_word, word_after, count

    none = jnp.int32(0)
    next_word, count = fetch(none, none)
    start = (none, count, none, next_word, none)
    state = jax.lax.while_loop(lambda state: state[1] > 0, step, start)
    if scatter:
        scatter.wait_for_writing(1 - state[0], state[4])


def _copy(source, from_row, target, to_row, semaphore) -> None:
    pltpu.make_async_copy(source.at[pl.ds(from_row, 1)], target.at[pl.ds(to_row, 1)], semaphore).start()


def wait_for_rows(tile: Ref, semaphore: Ref, count: Int[Array, ""]) -> None:
    """Until ``count`` rows were copied to or from a tile: in as many steps as the number has bits."""
    size = tile.shape[0]
    while size:

        @pl.when((count & size) != 0)
        def _(size=size):
            # What is waited for is that many bytes; where they come from does not matter.
            rows = tile.at[pl.ds(0, size)]
            pltpu.make_async_copy(rows, rows, semaphore).wait()

        size //= 2


def _for_each_key(
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


def unpack(
    tile, count: Int[Array, ""], block: Int[Array, ""], sizes: Sizes, keys, words, index_keys=None
) -> None:
    """The matrices of a tile's keys, and their words; rows behind the last are zero and nobody's."""
    filled = jax.lax.broadcasted_iota(jnp.int32, (KEYS, 1), 0) < count
    half = sizes.latent // 2
    latents = jnp.where(filled, tile[:, :half], 0)
    keys[:, :half] = upper_half(latents << 16)
    keys[:, half : 2 * half] = upper_half(latents)
    rest = jnp.where(filled, tile[:, half:], 0)
    keys[:, 2 * half :] = upper_half(rest[:, : sizes.rope])
    if index_keys is not None:
        pairs = rest[:, sizes.rope : sizes.rope + sizes.index_width // 2]
        index_keys[...] = jnp.concatenate([upper_half(pairs << 16), upper_half(pairs)], axis=1)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, rest.shape[1]), 1)
    own = lane == sizes.rope + sizes.index_width // 2 + block
    words[...] = jnp.sum(jnp.where(own, rest, 0), axis=1, keepdims=True)


def union_spec(sizes: Sizes, block=lambda b, i: (b, i)) -> pl.BlockSpec:
    """The union of a block, in scalar memory; ``block`` maps the grid to batch and block."""
    return pl.BlockSpec(
        (1, 1, 1, sizes.keys // BITS), lambda *ids: (*block(*ids), 0, 0), memory_space=pltpu.SMEM
    )


def rows_spec(rows: int, width: int, block=lambda b, i: (b, i)) -> pl.BlockSpec:
    """The rows of a block of queries in an array [B, blocks · rows, width]."""
    return pl.BlockSpec((1, rows, width), lambda *ids: (*block(*ids), 0))


def statistics_spec(rows: int, columns: int, block=lambda b, i: (b, i)) -> pl.BlockSpec:
    """The statistics of a block in an array [B, blocks, rows, columns]."""
    return pl.BlockSpec((1, 1, rows, columns), lambda *ids: (*block(*ids), 0, 0))


def tile_scratch(sizes: Sizes) -> list:
    """Two tiles as they arrive, the keys of one, and their words."""
    return [
        pltpu.VMEM((2, KEYS, sizes.row_words), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((KEYS, sizes.width), jnp.bfloat16),
        pltpu.VMEM((KEYS, 1), jnp.int32),
    ]


def compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Copies of rows are within bounds by construction: checking each would double its cost."""
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES, disable_bounds_checks=True
    )


def cost(sizes: Sizes, flops_per_key: int) -> pl.CostEstimate:
    """Of a block for a key, as if every block's union were a tile: the selection is not known when this is compiled."""
    blocks = sizes.batch * sizes.blocks
    memory = blocks * 4 * (sizes.columns * sizes.width + KEYS * sizes.row_words)
    return pl.CostEstimate(
        flops=blocks * KEYS * flops_per_key,
        transcendentals=blocks * KEYS * sizes.columns,
        bytes_accessed=memory,
    )


def columns_of(chunk: Int[Array, ""], sizes: Sizes):
    """The columns of a chunk, as an index."""
    return pl.ds(pl.multiple_of(chunk * sizes.chunk, sizes.chunk), sizes.chunk)


def is_member(words, chunk: Int[Array, ""], sizes: Sizes) -> Bool[Array, "K N"]:
    """Which of the tile's keys each (query, head) of a chunk selected: the query's bit of the key's word."""
    column = chunk * sizes.chunk + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.chunk), 1)
    return (words[...] & (1 << column // sizes.heads)) != 0
