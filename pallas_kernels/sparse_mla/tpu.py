"""Sparse attention on TPU, over the union of what 32 neighbouring queries selected (``union``).

Forward: one pass over the tiles of the union with a running maximum. Backward: one pass with the probabilities from
the log-sum-exp; the gradient of a tile's keys is added to their rows in memory, which are read and written one copy
a key. Blocks of one core follow one another, so nobody else adds to a row meanwhile; a chip whose two cores work as
one device has an accumulator for each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis, round_up
from pallas_kernels.pairs import product
from pallas_kernels.platform import tpu_cores, tpu_interpreter
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.shapes import Array, Float, UInt32
from pallas_kernels.softmax import LOG2_E, LOW, output_delta, to_base_2
from pallas_kernels.sparse_mla.union import (
    KEYS,
    Gather,
    Scatter,
    columns_of,
    compiler_params,
    cost,
    is_member,
    over_tiles,
    pad_queries,
    prepare,
    rows_spec,
    statistics_spec,
    tile_scratch,
    union_spec,
    unpack,
)


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
        in_specs=[
            union_spec(sizes),
            rows_spec(sizes.columns, sizes.width),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[rows_spec(sizes.columns, sizes.latent), statistics_spec(1, sizes.columns)],
        out_shape=[
            jax.ShapeDtypeStruct((*operands.q.shape[:2], sizes.latent), operands.q.dtype),
            jax.ShapeDtypeStruct((sizes.batch, sizes.blocks, 1, sizes.columns), jnp.float32),
        ],
        scratch_shapes=[
            *tile_scratch(sizes),
            pltpu.VMEM((sizes.latent, KEYS), operands.q.dtype),
            pltpu.VMEM((sizes.latent, sizes.columns), jnp.float32),
            pltpu.VMEM((2, 1, sizes.columns), jnp.float32),
        ],
        compiler_params=compiler_params("parallel", "parallel"),
        cost_estimate=cost(sizes, 2 * sizes.columns * (sizes.width + sizes.latent)),
        interpret=tpu_interpreter(),
        name="sparse_mla",
    )(operands.union, operands.q, operands.rows)
    o = o.reshape(sizes.batch, -1, sizes.heads, sizes.latent)[:, : q.shape[1], : q.shape[2], :latent_dim]
    lse = lse.reshape(sizes.batch, -1, sizes.heads)[:, : q.shape[1], : q.shape[2]]
    return o.astype(kv.dtype), lse


def _forward_kernel(
    union, q, rows, o, lse, gathered, arrived, keys, words, values, total, statistics, *, sizes, scale
):
    b, block = pl.program_id(0), pl.program_id(1)
    chunks = sizes.columns // sizes.chunk
    total[...] = jnp.zeros_like(total)
    statistics[0] = jnp.full(statistics.shape[1:], LOW / 2, jnp.float32)
    statistics[1] = jnp.zeros(statistics.shape[1:], jnp.float32)

    def attend_tile(tile, count):
        unpack(tile, count, block, sizes, keys, words)
        values[...] = keys[:, : sizes.latent].T
        jax.lax.fori_loop(0, chunks, attend_columns, 0)

    def attend_columns(c, _):
        columns = columns_of(c, sizes)
        scores = product(keys[...], q[0, columns, :], 1, 1) * (scale * LOG2_E)
        scores = jnp.where(is_member(words, c, sizes), scores, LOW)
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
        natural = statistics[0, :, columns] / LOG2_E + jnp.log(jnp.where(seen, sums, 1))
        lse[0, 0, :, columns] = jnp.where(seen, natural, -jnp.inf)
        o[0, columns, :] = (total[:, columns] / jnp.where(seen, sums, 1)).T.astype(o.dtype)
        return 0

    over_tiles(Gather(union, rows.at[b], gathered, arrived), attend_tile)
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
    delta = output_delta(o, d_o, d_lse)
    lse = to_base_2(lse)
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
            union_spec(sizes, block),
            rows_spec(sizes.columns, sizes.width, block),
            rows_spec(sizes.columns, sizes.latent, block),
            statistics_spec(1, sizes.columns, block),
            statistics_spec(1, sizes.columns, block),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[rows_spec(sizes.columns, sizes.width, block), pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
            jax.ShapeDtypeStruct((cores, sizes.batch, sizes.keys, row_width), jnp.float32),
        ],
        scratch_shapes=[
            *tile_scratch(sizes),
            pltpu.VMEM((sizes.width, KEYS), operands.q.dtype),
            pltpu.VMEM((sizes.width, sizes.columns), jnp.float32),
            *Scatter.scratch(row_width),
        ],
        input_output_aliases={6: 1},
        compiler_params=compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=cost(sizes, 2 * sizes.columns * (3 * sizes.width + 2 * sizes.latent)),
        interpret=tpu_interpreter(),
        name="sparse_mla_backward",
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
    d_q_t[...] = jnp.zeros_like(d_q_t)

    def differentiate_tile(tile, count):
        unpack(tile, count, block, sizes, keys, words)
        keys_t[...] = keys[...].T
        d_keys[...] = jnp.zeros_like(d_keys)
        jax.lax.fori_loop(0, chunks, differentiate_columns, 0)

    def differentiate_columns(c, _):
        columns = columns_of(c, sizes)
        queries, d_outputs = q[0, columns, :], d_o[0, columns, :]
        scores = product(keys[...], queries, 1, 1) * (scale * LOG2_E)
        scores = jnp.where(is_member(words, c, sizes), scores, LOW)
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

    scatter = Scatter(d_rows.at[core, b], d_keys, sums, sums_read, sums_written)
    over_tiles(Gather(union, rows.at[b], gathered, arrived), differentiate_tile, scatter)
    jax.lax.fori_loop(0, chunks, finish, 0)
