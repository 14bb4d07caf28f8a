"""The indexer's loss of sparse training on TPU, over the union of what 32 queries selected (``sparse_mla.union``).

Forward: one pass over the tiles of the union, summing for each query what its divergence is made of: ``Σ p log p``,
``Σ p I``, ``Σ p`` and the log-sum-exp of ``I``. Backward: one pass with ``dI = Σp · softmax(I) - p``; the gradient of
a tile's index keys is added to their rows in memory.

Queries stand behind heads along the lanes, four heads of 32 queries to a row of lanes: the sum over heads adds whole
registers, and at its end the four quarters of one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis
from pallas_kernels.pairs import product
from pallas_kernels.platform import tpu_cores, tpu_interpreter
from pallas_kernels.residuals import LSE
from pallas_kernels.selection import BITS
from pallas_kernels.shapes import Array, Float, UInt32
from pallas_kernels.softmax import LOG2_E, LOW, to_base_2
from pallas_kernels.sparse_mla.union import (
    KEYS,
    Gather,
    Scatter,
    Sizes,
    chunk_of,
    compiler_params,
    cost,
    over_tiles,
    pad_queries,
    prepare,
    rows_spec,
    statistics_spec,
    tile_scratch,
    union_spec,
    unpack,
)

_ROWS = 8  # of statistics, one register deep


class _Operands(NamedTuple):
    """As the kernels read them: rows of a block by head, then by query."""

    union: Array
    q: Float[Array, "B W*H*32 X"]
    lse: Float[Array, "B W 1 H*32"]  # to the base 2, and high where nothing is to be seen
    index_q: Float[Array, "B W*N*32 J"]
    index_w: Float[Array, "B W 1 N*32"]
    rows: Array


class _Sums(NamedTuple):
    """Of each query, from the forward pass [B, T]."""

    p: Float[Array, "B T"]
    score_lse: Float[Array, "B T"]  # of the index scores; 0 where nothing is selected


def sparse_indexer_loss(
    index_q: Float[Array, "B T N J"],
    index_k: Float[Array, "B S J"],
    index_w: Float[Array, "B T N"],
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    lse: Float[Array, "B T H"],
    selected: UInt32[Array, "B W S"],
    *,
    scale: float,
) -> Float[Array, "B T"]:
    """See ``api.sparse_indexer_loss``. Products in bfloat16."""
    q, kv, lse = jax.lax.stop_gradient((q, kv, lse))
    return _loss(index_q, index_k, index_w, q, kv, lse, selected, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _loss(index_q, index_k, index_w, q, kv, lse, selected, scale):
    return _forward(index_q, index_k, index_w, q, kv, lse, selected, scale)[0]


def _loss_fwd(*arguments):
    kl, sums = _forward(*arguments)
    return kl, (arguments[:-1], checkpoint_name(sums, LSE))


def _prepare(index_q, index_k, index_w, q, kv, lse, selected, cores: int = 1) -> tuple[_Operands, Sizes]:
    width = q.shape[-1]
    # Nothing here tells latent from rotary part: any cut does that leaves whole rows of lanes before it.
    cut = max((width - 1) // (2 * LANES) * 2 * LANES, width // 2)
    operands, sizes = prepare(q, kv, selected, cut, cores, index_k)
    lse = to_base_2(lse, -LOW)
    missing = sizes.heads - lse.shape[2]
    lse = jnp.pad(lse, [(0, 0), (0, 0), (0, missing)], constant_values=-LOW)
    index_q = pad_queries(pad_axis(index_q, 3, LANES).astype(jnp.bfloat16), cores)
    index_w = pad_queries(index_w.astype(jnp.float32), cores)
    by_query = operands.q.reshape(sizes.batch, -1, sizes.heads, sizes.width)
    return _Operands(
        operands.union,
        _by_head(by_query).reshape(operands.q.shape),
        _by_head(pad_queries(lse, cores)).reshape(sizes.batch, sizes.blocks, 1, -1),
        _by_head(index_q).reshape(sizes.batch, -1, sizes.index_width),
        _by_head(index_w).reshape(sizes.batch, sizes.blocks, 1, -1),
        operands.rows,
    ), sizes


def _by_head(x: Float[Array, "B T H ..."]) -> Float[Array, "B W H 32 ..."]:
    """Queries in blocks, in each of them behind their heads."""
    return x.reshape(x.shape[0], -1, BITS, *x.shape[2:]).swapaxes(2, 3)


def _specs(operands: _Operands, sizes: Sizes, block=lambda b, i: (b, i)) -> list[pl.BlockSpec]:
    index_columns = operands.index_w.shape[-1]
    return [
        union_spec(sizes, block),
        rows_spec(sizes.columns, sizes.width, block),
        statistics_spec(1, sizes.columns, block),
        rows_spec(index_columns, sizes.index_width, block),
        statistics_spec(1, index_columns, block),
        pl.BlockSpec(memory_space=pl.ANY),
    ]


def _cost(operands: _Operands, sizes: Sizes, products: int) -> pl.CostEstimate:
    """Attention once, and so many products with index keys."""
    index_columns = operands.index_w.shape[-1]
    return cost(sizes, 2 * (sizes.columns * sizes.width + products * index_columns * sizes.index_width))


def _scratch(sizes: Sizes) -> list:
    """A tile, its index keys, and for each key and query (four times over) ``p`` and ``I``."""
    pairs = pltpu.VMEM((KEYS, LANES), jnp.float32)
    return [*tile_scratch(sizes), pltpu.VMEM((KEYS, sizes.index_width), jnp.bfloat16), pairs, pairs]


def _forward(index_q, index_k, index_w, q, kv, lse, selected, scale) -> tuple[Array, _Sums]:
    operands, sizes = _prepare(index_q, index_k, index_w, q, kv, lse, selected)
    statistics = pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes, scale=scale, heads=q.shape[2]),
        grid=(sizes.batch, sizes.blocks),
        in_specs=_specs(operands, sizes),
        out_specs=statistics_spec(_ROWS, LANES),
        out_shape=jax.ShapeDtypeStruct((sizes.batch, sizes.blocks, _ROWS, LANES), jnp.float32),
        scratch_shapes=_scratch(sizes),
        compiler_params=compiler_params("parallel", "parallel"),
        cost_estimate=_cost(operands, sizes, products=1),
        interpret=tpu_interpreter(),
        name="indexer_loss",
    )(*operands)
    p_log_p, p_score, p, highest, total = (
        statistics[:, :, row, :BITS].reshape(sizes.batch, -1)[:, : q.shape[1]] for row in range(5)
    )
    seen = total > 0
    score_lse = jnp.where(seen, highest + jnp.log(jnp.where(seen, total, 1)), 0)
    return p_log_p - p_score + p * score_lse, _Sums(p, score_lse)


def _forward_kernel(
    union,
    q,
    lse,
    index_q,
    index_w,
    rows,
    out,
    gathered,
    arrived,
    keys,
    words,
    index_keys,
    p,
    scores,
    *,
    sizes,
    scale,
    heads,
):
    b, block = pl.program_id(0), pl.program_id(1)
    out[0, 0] = jnp.zeros(out.shape[2:], jnp.float32)
    out[0, 0, 3:4] = jnp.full((1, LANES), LOW / 2, jnp.float32)

    def measure_tile(tile, count):
        unpack(tile, count, block, sizes, keys, words, index_keys)
        member = _is_member(words)
        _attention(q, lse, keys, p, scale)
        target = jnp.where(member, p[...] / heads, 0)
        _index_scores(index_q, index_w, index_keys, scores)
        predicted = scores[...]
        out[0, 0, 0:1] += _over_keys(target * jnp.log(jnp.where(target > 0, target, 1)))
        out[0, 0, 1:2] += _over_keys(jnp.where(member, target * predicted, 0))
        out[0, 0, 2:3] += _over_keys(target)
        predicted = jnp.where(member, predicted, LOW)
        before = out[0, 0, 3:4]
        highest = jnp.maximum(before, jnp.max(predicted, axis=0, keepdims=True))
        total = _over_keys(jnp.exp(predicted - highest))
        out[0, 0, 3:4] = highest
        out[0, 0, 4:5] = out[0, 0, 4:5] * jnp.exp(before - highest) + total

    over_tiles(Gather(union, rows.at[b], gathered, arrived), measure_tile)


def _over_keys(x: Float[Array, "K 128"]) -> Float[Array, "1 128"]:
    return jnp.sum(x, axis=0, keepdims=True)


def _is_member(words):
    query = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) % BITS
    return (words[...] & (1 << query)) != 0


def _for_each_chunk(columns: int, visit) -> None:
    """``visit(columns, [the rows of lanes in them])`` over all columns."""
    size = chunk_of(columns)

    def step(c, _):
        visit(pl.ds(pl.multiple_of(c * size, size), size), range(0, size, LANES))
        return 0

    jax.lax.fori_loop(0, columns // size, step, 0)


def _fold(x: Float[Array, "K 128"]) -> Float[Array, "K 128"]:
    """The sum of the four quarters, in each of them."""
    x = x + pltpu.roll(x, LANES // 2, 1)
    return x + pltpu.roll(x, LANES // 4, 1)


def _attention(q, lse, keys, p, scale: float) -> None:
    """p: the attention of all heads to the keys of a tile, summed; of keys that are not a query's, anything."""
    p[...] = jnp.zeros_like(p)

    def add_heads(columns, lanes):
        logits = product(keys[...], q[0, columns, :], 1, 1) * (scale * LOG2_E)
        terms = jnp.exp2(logits - lse[0, 0, :, columns])
        p[...] += sum(terms[:, lane : lane + LANES] for lane in lanes)

    _for_each_chunk(q.shape[1], add_heads)
    p[...] = _fold(p[...])


def _index_scores(index_q, index_w, index_keys, scores) -> None:
    """scores: those of a tile's keys."""
    scores[...] = jnp.zeros_like(scores)

    def add_heads(columns, lanes):
        products = product(index_keys[...], index_q[0, columns, :], 1, 1)
        terms = jnp.maximum(products, 0) * index_w[0, 0, :, columns]
        scores[...] += sum(terms[:, lane : lane + LANES] for lane in lanes)

    _for_each_chunk(index_q.shape[1], add_heads)
    scores[...] = _fold(scores[...])


def _loss_bwd(scale, residuals, d_kl):
    arguments, sums = residuals
    index_q, index_k, index_w, q, *_ = arguments
    cores = tpu_cores()
    operands, sizes = _prepare(*arguments, cores=cores)
    blocks_of_core = sizes.blocks // cores

    def block(core, b, i):
        return b, core * blocks_of_core + i

    of_query = jnp.stack([sums.p, sums.score_lse, d_kl], axis=-1)
    of_query = pad_axis(pad_axis(of_query, 2, _ROWS), 1, BITS * cores)
    of_query = of_query.reshape(sizes.batch, sizes.blocks, BITS, _ROWS).swapaxes(2, 3)
    of_query = jnp.tile(of_query, (1, 1, 1, LANES // BITS))
    weights = operands.index_w.reshape(sizes.batch, -1, 1)
    weighted = (operands.index_q.astype(jnp.float32) * weights).astype(operands.index_q.dtype)
    index_columns = operands.index_w.shape[-1]
    index_rows = rows_spec(index_columns, sizes.index_width, block)
    d_raw, d_rows = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, scale=scale, heads=q.shape[2]),
        grid=(cores, sizes.batch, blocks_of_core),
        in_specs=[
            *_specs(operands, sizes, block),
            index_rows,
            statistics_spec(_ROWS, LANES, block),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[index_rows, pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=[
            jax.ShapeDtypeStruct(operands.index_q.shape, jnp.float32),
            jax.ShapeDtypeStruct((cores, sizes.batch, sizes.keys, sizes.index_width), jnp.float32),
        ],
        scratch_shapes=[
            *_scratch(sizes),
            pltpu.VMEM((sizes.index_width, KEYS), jnp.bfloat16),
            pltpu.VMEM((sizes.index_width, index_columns), jnp.float32),
            *Scatter.scratch(sizes.index_width),
        ],
        input_output_aliases={8: 1},
        compiler_params=compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(operands, sizes, products=4),
        interpret=tpu_interpreter(),
        name="indexer_loss_backward",
    )(
        *operands,
        weighted,
        of_query,
        jnp.zeros((cores, sizes.batch, sizes.keys, sizes.index_width), jnp.float32),
    )
    heads = index_columns // BITS
    d_raw = d_raw.reshape(sizes.batch, sizes.blocks, heads, BITS, sizes.index_width).swapaxes(2, 3)
    d_raw = d_raw.reshape(sizes.batch, -1, heads, sizes.index_width)
    d_raw = d_raw[:, : index_q.shape[1], : index_q.shape[2], : index_q.shape[3]]
    d_q = d_raw * index_w.astype(jnp.float32)[..., None]
    d_w = jnp.sum(d_raw * index_q.astype(jnp.float32), axis=-1)
    d_k = jnp.sum(d_rows, axis=0)[:, : index_k.shape[1], : index_k.shape[2]]
    nothing = [None] * (len(arguments) - 3)
    return d_q.astype(index_q.dtype), d_k.astype(index_k.dtype), d_w.astype(index_w.dtype), *nothing


_loss.defvjp(_loss_fwd, _loss_bwd)


def _backward_kernel(
    union,
    q,
    lse,
    index_q,
    index_w,
    rows,
    weighted,
    of_query,
    _zeros,
    d_raw,
    d_rows,
    gathered,
    arrived,
    keys,
    words,
    index_keys,
    p,
    scores,
    index_keys_t,
    d_raw_t,
    d_keys,
    sums,
    sums_read,
    sums_written,
    *,
    sizes,
    scale,
    heads,
):
    """``d_raw`` is the gradient of ``w q``: that of q is w times it, that of w is q times it."""
    core, b = pl.program_id(0), pl.program_id(1)
    block = core * pl.num_programs(2) + pl.program_id(2)
    d_raw_t[...] = jnp.zeros_like(d_raw_t)

    def differentiate_tile(tile, count):
        unpack(tile, count, block, sizes, keys, words, index_keys)
        index_keys_t[...] = index_keys[...].T
        _attention(q, lse, keys, p, scale)
        _index_scores(index_q, index_w, index_keys, scores)
        p_sum, score_lse, d_kl = (of_query[0, 0, row : row + 1] for row in range(3))
        d_scores = (p_sum * jnp.exp(scores[...] - score_lse) - p[...] / heads) * d_kl
        p[...] = jnp.where(_is_member(words), d_scores, 0)
        d_keys[...] = jnp.zeros_like(d_keys)
        _for_each_chunk(index_q.shape[1], differentiate_columns)

    def differentiate_columns(columns, lanes):
        products = product(index_keys[...], index_q[0, columns, :], 1, 1)
        d_scores = jnp.concatenate([p[...]] * len(lanes), axis=1)
        passed = jnp.where(products > 0, d_scores, 0).astype(jnp.bfloat16)
        d_raw_t[:, columns] += product(index_keys_t[...], passed, 1, 0)
        d_keys[...] += product(passed, weighted[0, columns, :], 1, 0)

    def finish(columns, _):
        d_raw[0, columns, :] = d_raw_t[:, columns].T

    scatter = Scatter(d_rows.at[core, b], d_keys, sums, sums_read, sums_written)
    over_tiles(Gather(union, rows.at[b], gathered, arrived), differentiate_tile, scatter)
    _for_each_chunk(index_q.shape[1], finish)
