"""Decoding on TPU.

Scores: pages of index keys are copied through the page table, a tile of them while the one before is multiplied; all
heads of a query stand along the sublanes and are summed there. Tiles past the last query cost a row of -inf.

Attention: what any of a sequence's queries selected becomes a list (``listing``), whose rows are copied from their
pages one by one, a tile of them while the one before is attended. Visiting the bits of the mask instead, as training
does for 32 queries at once, would cost more than everything else: 131,072 keys are 4,096 words with a bit in every
other one. In e4m3, the bytes
of a row's words are widened to bfloat16 in VMEM by integer arithmetic: not every TPU has the format.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis, round_up
from pallas_kernels.decode.cache import GROUP, PackedCache, Widths, widths_of
from pallas_kernels.decode.listing import PLACE_BITS, entries_shape, list_set, rows_at_a_time
from pallas_kernels.pairs import product
from pallas_kernels.platform import UnsupportedError, tpu_interpreter
from pallas_kernels.selection import BITS, require_mask
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.softmax import LOG2_E, LOW
from pallas_kernels.sparse_mla.union import KEYS, compiler_params, wait_for_rows
from pallas_kernels.topk.tpu import topk_mask
from pallas_kernels.words import upper_half

_SUBLANES = 16  # rows of a register of bfloat16
_TILE, _CHUNK = 1024, 256  # keys that are copied at a time, and multiplied
_AHEAD = 2  # tiles that are on their way while one is multiplied
_TILES = _AHEAD + 1
_SPAN = 131072  # keys whose scores stay in VMEM
_ROWS_OF_TILE = KEYS // LANES  # of the list
_LISTED = 8 * _ROWS_OF_TILE  # rows of the list in scalar memory
_UNROLL = 8  # rows whose copies are started together: those of a register, whose places in it are known


def paged_index_scores(
    q: Float[Array, "B T N J"],
    w: Float[Array, "B T N"],
    cache: PackedCache,
    page_table: Int[Array, "B M"],
    number: Int[Array, "B T"],
) -> Float[Array, "B T M*G"]:
    """See ``api.paged_index_scores``. Products in bfloat16, which holds e4m3 exactly."""
    batch, queries = number.shape
    size, width = cache.page_size, cache.index_key.shape[-1]
    keys, of_tile = page_table.shape[1] * size, max(1, _TILE // size)
    tiles = -(-page_table.shape[1] // of_tile)
    of_span = min(tiles, max(1, _SPAN // (of_tile * size)))
    tiles = round_up(tiles, of_span)
    table = pad_axis(page_table, 1, tiles * of_tile)
    q = pad_axis(pad_axis(q.astype(jnp.bfloat16), 3, width), 2, _SUBLANES)
    w = pad_axis(w.astype(jnp.float32), 2, _SUBLANES).swapaxes(1, 2)
    in_memory = [cache.index_key] if cache.index_scale is None else [cache.index_key, cache.index_scale]
    (scores,) = pl.pallas_call(
        functools.partial(_scores_kernel, arrays=len(in_memory)),
        grid=(batch, tiles // of_span),
        in_specs=[
            pl.BlockSpec((1, 1, table.shape[1]), lambda b, i: (b, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, queries), lambda b, i: (b, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, q.shape[1] * q.shape[2], width), lambda b, i: (b, 0, 0)),
            pl.BlockSpec((1, *w.shape[1:]), lambda b, i: (b, 0, 0)),
            *[pl.BlockSpec(memory_space=pl.ANY)] * len(in_memory),
        ],
        out_specs=[pl.BlockSpec((1, queries, of_span * of_tile * size), lambda b, i: (b, 0, i))],
        out_shape=[jax.ShapeDtypeStruct((batch, queries, tiles * of_tile * size), jnp.float32)],
        scratch_shapes=[
            *(pltpu.VMEM((_TILES, of_tile, *array.shape[1:]), array.dtype) for array in in_memory),
            pltpu.SemaphoreType.DMA((_TILES, len(in_memory))),
        ],
        compiler_params=compiler_params("parallel", "parallel"),
        cost_estimate=pl.CostEstimate(
            flops=2 * keys * width * w.size,
            transcendentals=0,
            bytes_accessed=batch * keys * width * cache.index_key.dtype.itemsize,
        ),
        interpret=tpu_interpreter(),
        name="paged_index_scores",
    )(table[:, None], number[:, None], q.reshape(batch, -1, width), w, *in_memory)
    return scores[:, :, :keys]


def _scores_kernel(table, number, q, w, *rest, arrays: int):
    """One span of a sequence; ``rest`` is what lies in memory, the scores, two tiles of each, and semaphores."""
    in_memory, out, tiles, arrived = rest[:arrays], rest[arrays], rest[arrays + 1 : -1], rest[-1]
    queries, span = out.shape[1:]
    of_tile, size = tiles[0].shape[1:3]
    first = pl.program_id(1) * (span // (of_tile * size))
    last = functools.reduce(jnp.maximum, [number[0, 0, t] for t in range(queries)])
    live = jnp.clip(last // (of_tile * size) + 1 - first, 0, span // (of_tile * size))
    out[0] = jnp.full((queries, span), -jnp.inf, jnp.float32)

    def fetch(i, buffer):
        for p in range(of_tile):
            # Past the last page in use the table may hold anything: the last is read again.
            page = table[0, 0, jnp.minimum((first + i) * of_tile + p, last // size)]
            pltpu.make_async_copy(
                in_memory[0].at[page], tiles[0].at[buffer, p], arrived.at[buffer, 0]
            ).start()
            for scales, target in zip(in_memory[1:], tiles[1:], strict=True):
                source, target = scales.at[pl.ds(page, 1)], target.at[buffer, pl.ds(p, 1)]
                pltpu.make_async_copy(source, target, arrived.at[buffer, 1]).start()

    def wait(buffer):
        for n in range(arrays):
            tile = tiles[n].at[buffer]
            pltpu.make_async_copy(tile, tile, arrived.at[buffer, n]).wait()

    def score_tile(i, buffer):
        wait(buffer)
        start = i * of_tile * size
        limits = [number[0, 0, t] - first * of_tile * size - start for t in range(queries)]
        _score_tile(q, w, [tile.at[buffer] for tile in tiles], limits, out.at[0], start)
        # Without a condition, which would keep the scalar core's work from running beside the vector units'.
        fetch(i + _AHEAD, (buffer + _AHEAD) % _TILES)
        return (buffer + 1) % _TILES

    @pl.when(live > 0)
    def _():
        for i in range(_AHEAD):
            fetch(i, i)
        buffer = jax.lax.fori_loop(0, live, score_tile, jnp.int32(0))
        for i in range(_AHEAD):
            wait((buffer + i) % _TILES)


def _score_tile(q, w, tiles, limits: list[Int[Array, ""]], out, start: Int[Array, ""]):
    """Scores of the pages of a tile; each query's limit is the last of its keys that it sees."""
    pages, size, width = tiles[0].shape
    heads, chunk = w.shape[1], max(size, _CHUNK)
    for first in range(0, pages, chunk // size):
        some = slice(first, first + chunk // size)
        keys = tiles[0][some].astype(jnp.bfloat16).reshape(-1, width)
        key = first * size + jax.lax.broadcasted_iota(jnp.int32, (1, keys.shape[0]), 1)
        for t, limit in enumerate(limits):
            products = product(q[0, t * heads : (t + 1) * heads, :], keys, 1, 1)
            total = jnp.sum(jnp.maximum(products, 0) * w[0, :, t : t + 1], axis=0, keepdims=True)
            if len(tiles) > 1:
                total *= jnp.concatenate(
                    [tiles[1][p : p + 1] for p in range(first, first + chunk // size)], axis=1
                )
            place = pl.ds(pl.multiple_of(start + first * size, keys.shape[0]), keys.shape[0])
            out[t : t + 1, place] = jnp.where(key <= limit, total, -jnp.inf)


def select(scores: Float[Array, "B T S"], k: int) -> UInt32[Array, "B 1 S"]:
    """``topk.topk_mask``, for few queries of many sequences: selecting works on rows of 32 queries at once."""
    batch, queries, keys = scores.shape
    of_sequence = 1 << (queries - 1).bit_length()  # divides 32: a sequence's bits lie in one word
    missing = of_sequence - queries
    scores = jnp.pad(scores, [(0, 0), (0, missing), (0, 0)], constant_values=-jnp.inf)
    words = topk_mask(scores.reshape(1, -1, keys), k)[0]
    bit = of_sequence * jnp.arange(batch, dtype=jnp.uint32)
    own = (words[bit // BITS] >> (bit % BITS)[:, None]) & jnp.uint32((1 << of_sequence) - 1)
    return own[:, None]


def paged_sparse_mla(
    q: Float[Array, "B T H C+R"],
    cache: PackedCache,
    page_table: Int[Array, "B M"],
    selected: UInt32[Array, "B 1 S"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.paged_sparse_mla``. Products in bfloat16."""
    batch, queries, all_heads, _ = q.shape
    keys = page_table.shape[1] * cache.page_size
    require_mask("paged_sparse_mla", selected, queries, keys)
    widths = widths_of(latent_dim, q.shape[3] - latent_dim, cache.index_scale is not None)
    parts = pad_axis(q[..., :latent_dim], 3, widths.latent), pad_axis(q[..., latent_dim:], 3, widths.rope)
    padded = pad_axis(jnp.concatenate(parts, axis=-1).astype(jnp.bfloat16), 2, _SUBLANES)
    heads, width = padded.shape[2:]
    words = jax.lax.bitcast_convert_type(selected[:, 0], jnp.int32)
    places = (page_table[:, :, None] * cache.page_size + jnp.arange(cache.page_size)).reshape(batch, keys)
    words, places = (
        pad_axis(x, 1, rows_at_a_time(keys) * LANES).reshape(batch, -1, LANES) for x in (words, places)
    )
    rows = cache.rows.reshape(-1, widths.row_words)
    if rows.shape[0] > 1 << PLACE_BITS:
        raise UnsupportedError(
            f"paged_sparse_mla: a cache of {rows.shape[0]} tokens was given, and the TPU kernel counts up to "
            f"{1 << PLACE_BITS}: share the sequences among several caches"
        )

    def of_sequence(*block: int, **where) -> pl.BlockSpec:
        return pl.BlockSpec((1, *block), lambda b: (b, *[0] * len(block)), **where)

    pairs = batch * queries * heads * KEYS
    o, lse = pl.pallas_call(
        functools.partial(_attend_kernel, widths=widths, scale=scale),
        grid=(batch,),
        in_specs=[
            of_sequence(*words.shape[1:]),
            of_sequence(*words.shape[1:]),
            of_sequence(queries, heads, width),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[of_sequence(queries, heads, widths.latent), of_sequence(queries, heads, 1)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, queries, heads, widths.latent), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, queries, heads, 1), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM(entries_shape(words.shape[1]), jnp.int32),
            pltpu.SMEM((_LISTED, LANES), jnp.int32),
            pltpu.VMEM((2, KEYS // _UNROLL, _UNROLL, widths.row_words), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((KEYS, width), jnp.bfloat16),
            pltpu.VMEM((queries, heads, widths.latent), jnp.float32),
            pltpu.VMEM((2, queries, heads, 1), jnp.float32),
        ],
        compiler_params=compiler_params("parallel"),
        cost_estimate=pl.CostEstimate(  # as if a sequence's union were a tile: the selection is not known yet
            flops=2 * pairs * (width + widths.latent),
            transcendentals=pairs,
            bytes_accessed=4 * batch * KEYS * widths.row_words,
        ),
        interpret=tpu_interpreter(),
        name="paged_sparse_mla",
    )(words, places, padded, rows)
    return o[:, :, :all_heads, :latent_dim].astype(q.dtype), lse[:, :, :all_heads, 0]


def _attend_kernel(
    words,
    places,
    q,
    rows,
    o,
    lse,
    entries,
    listed,
    gathered,
    arrived,
    keys,
    total,
    statistics,
    *,
    widths: Widths,
    scale: float,
):
    """One sequence."""
    total[...] = jnp.zeros_like(total)
    statistics[0] = jnp.full(statistics.shape[1:], LOW / 2, jnp.float32)
    statistics[1] = jnp.zeros(statistics.shape[1:], jnp.float32)
    count = list_set(words.at[0], places.at[0], entries)
    tiles = (count + KEYS - 1) // KEYS

    def pieces(tile):
        """Of a tile, whose rows are copied together; behind the last key, row 0 of the cache is."""
        return (jnp.minimum(count - tile * KEYS, KEYS) + _UNROLL - 1) // _UNROLL

    def fetch(tile, buffer):
        own = (tile * _ROWS_OF_TILE) & (_LISTED - 1)

        @pl.when(own == 0)
        def _():
            first = pl.multiple_of(tile * _ROWS_OF_TILE, _LISTED)
            pltpu.sync_copy(entries.at[pl.ds(first, _LISTED)], listed)

        def fetch_piece(i, _):
            first = i * _UNROLL
            # A shift, because the scalar core has no division.
            line, lane = own + (first >> LANES.bit_length() - 1), first & (LANES - 1)
            # All places before the first copy: what is read after one waits for it to start.
            found = [listed[line, lane + n] & ((1 << PLACE_BITS) - 1) for n in range(_UNROLL)]
            for n, place in enumerate(found):
                source, target = rows.at[pl.ds(place, 1)], gathered.at[buffer, i, pl.ds(n, 1)]
                pltpu.make_async_copy(source, target, arrived.at[buffer]).start()
            return 0

        jax.lax.fori_loop(0, pieces(tile), fetch_piece, 0)

    def attend_tile(tile, buffer):
        @pl.when(tile + 1 < tiles)
        def _():
            fetch(tile + 1, 1 - buffer)

        wait_for_rows(gathered.at[buffer], arrived.at[buffer], pieces(tile))
        _unpack(gathered.at[buffer], count - tile * KEYS, widths, keys)
        own = [entries[pl.ds(tile * _ROWS_OF_TILE + r, 1), :] for r in range(_ROWS_OF_TILE)]
        members = jnp.concatenate(own, axis=1) >> PLACE_BITS
        jax.lax.fori_loop(0, q.shape[1], functools.partial(attend_query, members), 0)
        return 1 - buffer

    def attend_query(members, t, _):
        scores = product(q[0, t], keys[...], 1, 1) * (scale * LOG2_E)
        scores = jnp.where((members >> t) & 1 != 0, scores, LOW)
        highest = jnp.maximum(statistics[0, t], jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - highest)
        shrink = jnp.exp2(statistics[0, t] - highest)
        statistics[0, t] = highest
        statistics[1, t] = statistics[1, t] * shrink + jnp.sum(p, axis=1, keepdims=True)
        values = keys[:, : widths.latent]
        total[t] = total[t] * shrink + product(p.astype(values.dtype), values, 1, 0)
        return 0

    @pl.when(tiles > 0)
    def _():
        fetch(jnp.int32(0), jnp.int32(0))
        jax.lax.fori_loop(0, tiles, attend_tile, jnp.int32(0))

    sums = statistics[1]
    divisor = jnp.where(sums > 0, sums, 1)
    lse[0] = jnp.where(sums > 0, statistics[0] / LOG2_E + jnp.log(divisor), -jnp.inf)
    o[0] = (total[...] / divisor).astype(o.dtype)


def _unpack(tile, count: Int[Array, ""], widths: Widths, keys) -> None:
    """The matrix of a tile's keys; rows behind the last are zero."""
    filled = jax.lax.broadcasted_iota(jnp.int32, (KEYS, 1), 0) < count
    words = jnp.where(filled, tile[:, :, : widths.latent_words].reshape(KEYS, -1), 0)
    rest = jnp.where(filled, tile[:, :, widths.latent_words :].reshape(KEYS, -1), 0)
    keys[:, widths.latent :] = upper_half(rest[:, : widths.rope])
    if not widths.in_e4m3:
        keys[:, : widths.latent_words] = upper_half(words << 16)
        keys[:, widths.latent_words : widths.latent] = upper_half(words)
        return
    scales = jax.lax.bitcast_convert_type(rest[:, widths.rope : widths.rope + widths.scales], jnp.float32)
    for i in range(widths.scales):
        octet, column = divmod(i * GROUP, widths.latent_words)
        numbers = _widened(words[:, column : column + GROUP], octet)
        keys[:, i * GROUP : (i + 1) * GROUP] = (numbers * scales[:, i : i + 1]).astype(keys.dtype)


def _widened(words: Int[Array, "K X"], octet: int) -> Float[Array, "K X"]:
    """The e4m3 number in a byte of each word, in float32."""
    magnitude = (words >> (8 * octet)) & 127
    # Exponent and mantissa in their places, the exponent's bias exchanged.
    number = jax.lax.bitcast_convert_type((magnitude << 20) + ((127 - 7) << 23), jnp.float32)
    # Below the smallest normal number the format has no leading one: 2^-7 (1 + m/8) stands for 2^-6 m/8.
    number = jnp.minimum(number, number + (number - 2.0**-6))
    sign = (words << (24 - 8 * octet)) & jnp.int32(-(1 << 31))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(number, jnp.int32) | sign, jnp.float32)
