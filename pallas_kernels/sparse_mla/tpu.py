"""Sparse attention on TPU, over the union of what 32 neighbouring queries selected (``union``).

Forward: one pass over the tiles of the union with a running maximum. Backward: one pass with the probabilities from
the log-sum-exp; the gradient of a tile's keys is added to their rows in memory, which are read and written one copy
a key. Blocks of one core follow one another, so nobody else adds to a row meanwhile; a chip whose two cores work as
one device has an accumulator for each.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from pallas_kernels.blocks import pad_axis, round_up
from pallas_kernels.platform import tpu_cores, tpu_interpreter
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import BITS
from pallas_kernels.sparse_mla.union import (
    KEYS,
    LANES,
    VMEM_BYTES,
    Sizes,
    columns_of,
    for_each_key,
    is_member,
    pad_queries,
    prepare,
    product,
    unpack,
    wait_for_rows,
)

_LOW = -1e30  # the score of a key that is not a query's: far below half of it, where the highest score begins
_LOG2_E = math.log2(math.e)  # powers of two are what the hardware has


def sparse_mla(
    q: Float[Array, "B T H C+R"],
    kv: Float[Array, "B S C+R"],
    selected: UInt32[Array, "B W S"],
    *,
    latent_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """See ``api.sparse_mla``. Products in bfloat16."""
    return _attend(q, kv, selected, latent_dim, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: Array, kv: Array, selected: Array, latent_dim: int, scale: float) -> tuple[Array, Array]:
    return _forward(q, kv, selected, latent_dim, scale)


def _forward(q: Array, kv: Array, selected: Array, latent_dim: int, scale: float) -> tuple[Array, Array]:
    operands, sizes = prepare(q, kv, selected, latent_dim)
    o, lse = pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes, scale=scale),
        grid=(sizes.batch, sizes.blocks),
        in_specs=[_union_spec(sizes), _query_spec(sizes, sizes.width), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=[_query_spec(sizes, sizes.latent), _statistics_spec(sizes)],
        out_shape=[
            jax.ShapeDtypeStruct((*operands.q.shape[:2], sizes.latent), operands.q.dtype),
            jax.ShapeDtypeStruct((sizes.batch, sizes.blocks, 1, sizes.columns), jnp.float32),
        ],
        scratch_shapes=[
            *_tile_scratch(sizes),
            pltpu.VMEM((sizes.latent, KEYS), operands.q.dtype),
            pltpu.VMEM((sizes.latent, sizes.columns), jnp.float32),
            pltpu.VMEM((2, 1, sizes.columns), jnp.float32),
        ],
        compiler_params=_compiler_params("parallel", "parallel"),
        cost_estimate=_cost(sizes, 2 * (sizes.width + sizes.latent)),
        interpret=tpu_interpreter(),
    )(operands.union, operands.q, operands.rows)
    o = o.reshape(sizes.batch, -1, sizes.heads, sizes.latent)[:, : q.shape[1], : q.shape[2], :latent_dim]
    lse = lse.reshape(sizes.batch, -1, sizes.heads)[:, : q.shape[1], : q.shape[2]]
    return o.astype(kv.dtype), lse


def _union_spec(sizes: Sizes, block=lambda b, i: (b, i)):
    return pl.BlockSpec(
        (1, 1, 1, sizes.keys // BITS), lambda *ids: (*block(*ids), 0, 0), memory_space=pltpu.SMEM
    )


def _query_spec(sizes: Sizes, width: int, block=lambda b, i: (b, i)):
    return pl.BlockSpec((1, sizes.columns, width), lambda *ids: (*block(*ids), 0))


def _statistics_spec(sizes: Sizes, block=lambda b, i: (b, i)):
    return pl.BlockSpec((1, 1, 1, sizes.columns), lambda *ids: (*block(*ids), 0, 0))


def _tile_scratch(sizes: Sizes) -> list:
    """Two tiles as they arrive, the keys of one, and their words."""
    return [
        pltpu.VMEM((2, KEYS, sizes.row_words), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((KEYS, sizes.width), jnp.bfloat16),
        pltpu.VMEM((KEYS, 1), jnp.int32),
    ]


def _compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
    )


def _cost(sizes: Sizes, flops_per_pair: int) -> pl.CostEstimate:
    """As if every block's union were a tile: the selection is not known when the program is made."""
    pairs = sizes.batch * sizes.blocks * sizes.columns * KEYS
    return pl.CostEstimate(
        flops=pairs * flops_per_pair,
        transcendentals=pairs,
        bytes_accessed=sizes.batch
        * sizes.blocks
        * (sizes.columns * 4 * sizes.width + KEYS * 4 * sizes.row_words),
    )


def _forward_kernel(
    union, q, rows, o, lse, gathered, arrived, keys, words, values, total, statistics, *, sizes, scale
):
    b, block = pl.program_id(0), pl.program_id(1)
    chunks = sizes.columns // sizes.chunk
    total[...] = jnp.zeros_like(total)
    statistics[0] = jnp.full(statistics.shape[1:], _LOW / 2, jnp.float32)
    statistics[1] = jnp.zeros(statistics.shape[1:], jnp.float32)

    def fetch(first_word, buffer):
        def copy(key, place):
            source, target = rows.at[b, pl.ds(key, 1)], gathered.at[buffer, pl.ds(place, 1)]
            pltpu.make_async_copy(source, target, arrived.at[buffer]).start()

        return for_each_key(union, first_word, copy)

    def attend_tile(state):
        buffer, count, next_word = state
        after, next_count = fetch(next_word, 1 - buffer)
        wait_for_rows(rows.at[b], gathered.at[buffer], arrived.at[buffer], count)
        unpack(gathered.at[buffer], count, block, sizes, keys, words)
        values[...] = keys[:, : sizes.latent].T
        jax.lax.fori_loop(0, chunks, attend_columns, 0)
        return 1 - buffer, next_count, after

    def attend_columns(c, _):
        columns = columns_of(c, sizes)
        scores = product(keys[...], q[0, columns, :], 1, 1) * (scale * _LOG2_E)
        scores = jnp.where(is_member(words, c, sizes), scores, _LOW)
        highest = jnp.maximum(statistics[0, :, columns], jnp.max(scores, axis=0, keepdims=True))
        p = jnp.exp2(scores - highest)
        shrink = jnp.exp2(statistics[0, :, columns] - highest)
        statistics[0, :, columns] = highest
        statistics[1, :, columns] = statistics[1, :, columns] * shrink + jnp.sum(p, axis=0, keepdims=True)
        total[:, columns] = total[:, columns] * shrink + product(values[...], p.astype(keys.dtype), 1, 0)
        return 0

    def finish(c, _):
        columns = columns_of(c, sizes)
        sums = statistics[1, :, columns]
        seen = sums > 0
        natural = statistics[0, :, columns] / _LOG2_E + jnp.log(jnp.where(seen, sums, 1))
        lse[0, 0, :, columns] = jnp.where(seen, natural, -jnp.inf)
        o[0, columns, :] = (total[:, columns] / jnp.where(seen, sums, 1)).T.astype(o.dtype)
        return 0

    next_word, count = fetch(jnp.int32(0), 0)
    jax.lax.while_loop(lambda state: state[1] > 0, attend_tile, (jnp.int32(0), count, next_word))
    jax.lax.fori_loop(0, chunks, finish, 0)


def _attend_fwd(q, kv, selected, latent_dim, scale):
    o, lse = _forward(q, kv, selected, latent_dim, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, kv, selected, o, lse)


def _attend_bwd(latent_dim, scale, residuals, gradients):
    q, kv, selected, o, lse = residuals
    d_o, d_lse = gradients
    cores = tpu_cores()
    operands, sizes = prepare(q, kv, selected, latent_dim, cores)
    delta = jnp.sum(o.astype(jnp.float32) * d_o.astype(jnp.float32), axis=-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse * _LOG2_E, 0)
    d_o = pad_queries(pad_axis(d_o, 3, 2 * LANES).astype(jnp.bfloat16), cores)
    lse, delta = (
        pad_queries(x, cores).reshape(sizes.batch, sizes.blocks, 1, sizes.columns) for x in (lse, delta)
    )
    blocks_of_core = sizes.blocks // cores
    row_width = round_up(sizes.width, LANES)

    def block(core, b, i):
        return b, core * blocks_of_core + i

    d_q, d_rows = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, scale=scale),
        grid=(cores, sizes.batch, blocks_of_core),
        in_specs=[
            _union_spec(sizes, block),
            _query_spec(sizes, sizes.width, block),
            _query_spec(sizes, sizes.latent, block),
            _statistics_spec(sizes, block),
            _statistics_spec(sizes, block),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[_query_spec(sizes, sizes.width, block), pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
            jax.ShapeDtypeStruct((cores, sizes.batch, sizes.keys, row_width), jnp.float32),
        ],
        scratch_shapes=[
            *_tile_scratch(sizes),
            pltpu.VMEM((sizes.width, KEYS), operands.q.dtype),
            pltpu.VMEM((sizes.width, sizes.columns), jnp.float32),
            pltpu.VMEM((KEYS, row_width), jnp.float32),
            pltpu.VMEM((2, KEYS, row_width), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        input_output_aliases={6: 1},
        compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(sizes, 2 * (3 * sizes.width + 2 * sizes.latent)),
        interpret=tpu_interpreter(),
    )(
        operands.union,
        operands.q,
        d_o.reshape(*operands.q.shape[:2], -1),
        lse,
        delta,
        operands.rows,
        jnp.zeros((cores, sizes.batch, sizes.keys, row_width), jnp.float32),
    )
    d_q = d_q.reshape(sizes.batch, -1, sizes.heads, sizes.width)[:, : q.shape[1], : q.shape[2]]
    d_kv = jnp.sum(d_rows, axis=0)[:, : kv.shape[1]]
    rope = kv.shape[-1] - latent_dim

    def features(x):
        return jnp.concatenate([x[..., :latent_dim], x[..., sizes.latent : sizes.latent + rope]], axis=-1)

    return features(d_q).astype(q.dtype), features(d_kv).astype(kv.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _backward_kernel(
    union,
    q,
    d_o,
    lse,
    delta,
    rows,
    _zeros,
    d_q,
    d_rows,
    gathered,
    arrived,
    keys,
    words,
    keys_t,
    d_q_t,
    d_keys,
    sums,
    sums_read,
    sums_written,
    *,
    sizes,
    scale,
):
    core, b = pl.program_id(0), pl.program_id(1)
    block = core * pl.num_programs(2) + pl.program_id(2)
    chunks = sizes.columns // sizes.chunk
    all_sums = d_rows.at[core, b]
    d_q_t[...] = jnp.zeros_like(d_q_t)

    def fetch(first_word, buffer):
        def copy(key, place):
            source, target = rows.at[b, pl.ds(key, 1)], gathered.at[buffer, pl.ds(place, 1)]
            pltpu.make_async_copy(source, target, arrived.at[buffer]).start()
            source, target = all_sums.at[pl.ds(key, 1)], sums.at[buffer, pl.ds(place, 1)]
            pltpu.make_async_copy(source, target, sums_read.at[buffer]).start()

        return for_each_key(union, first_word, copy)

    def write(first_word, buffer):
        def copy(key, place):
            source, target = sums.at[buffer, pl.ds(place, 1)], all_sums.at[pl.ds(key, 1)]
            pltpu.make_async_copy(source, target, sums_written.at[buffer]).start()

        for_each_key(union, first_word, copy)

    def wait_for_writing(buffer, count):
        wait_for_rows(sums.at[buffer], all_sums, sums_written.at[buffer], count)

    def differentiate_tile(state):
        buffer, count, first_word, next_word, being_written = state
        wait_for_writing(1 - buffer, being_written)
        after, next_count = fetch(next_word, 1 - buffer)
        wait_for_rows(rows.at[b], gathered.at[buffer], arrived.at[buffer], count)
        unpack(gathered.at[buffer], count, block, sizes, keys, words)
        keys_t[...] = keys[...].T
        d_keys[...] = jnp.zeros_like(d_keys)
        jax.lax.fori_loop(0, chunks, differentiate_columns, 0)
        wait_for_rows(all_sums, sums.at[buffer], sums_read.at[buffer], count)
        sums[buffer] += d_keys[...]
        write(first_word, buffer)
        return 1 - buffer, next_count, next_word, after, count

    def differentiate_columns(c, _):
        columns = columns_of(c, sizes)
        queries, d_outputs = q[0, columns, :], d_o[0, columns, :]
        scores = product(keys[...], queries, 1, 1) * (scale * _LOG2_E)
        scores = jnp.where(is_member(words, c, sizes), scores, _LOW)
        p = jnp.exp2(scores - lse[0, 0, :, columns])
        d_p = product(keys[:, : sizes.latent], d_outputs, 1, 1)
        d_scores = (p * (d_p - delta[0, 0, :, columns]) * scale).astype(keys.dtype)
        d_q_t[:, columns] += product(keys_t[...], d_scores, 1, 0)
        d_keys[:, : sizes.width] += product(d_scores, queries, 1, 0)
        d_keys[:, : sizes.latent] += product(p.astype(keys.dtype), d_outputs, 1, 0)
        return 0

    def finish(c, _):
        columns = columns_of(c, sizes)
        d_q[0, columns, :] = d_q_t[:, columns].T.astype(d_q.dtype)
        return 0

    none = jnp.int32(0)
    next_word, count = fetch(none, 0)
    state = jax.lax.while_loop(
        lambda state: state[1] > 0, differentiate_tile, (none, count, none, next_word, none)
    )
    wait_for_writing(1 - state[0], state[4])
    jax.lax.fori_loop(0, chunks, finish, 0)
