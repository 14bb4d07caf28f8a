"""The FP8 product on TPU: every 128 of the contraction are a product of their own, scaled as it leaves the MXU.

A tile of the result stays in VMEM while the contraction runs over it. An MXU that takes e4m3 (tpu7x) gets it, and so
does v6e's, for which Mosaic widens it in a quarter fewer bundles than is done here for others (v5p): to bfloat16 in
VMEM, which holds every e4m3 number exactly. The scales are multiplied in float32, so they may be any numbers. A product
of 128 fills the MXU of v5p, and half of the depth of one that is 256 deep: to let two blocks share it, one of their
scales would have to go into an operand, and be rounded.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, pad_axis, round_up
from pallas_kernels.fp8_matmul.reference import BLOCK, scales_of_columns
from pallas_kernels.platform import tpu_interpreter
from pallas_kernels.shapes import Array, Float

_ROWS, _COLUMNS, _BLOCKS = 512, 1024, 8  # of a tile; blocks of the contraction a step
_VMEM_BYTES = 56 << 20


def fp8_matmul(
    x: Float[Array, "M K"],
    x_scale: Float[Array, "M k"],
    w: Float[Array, "K N"] | Float[Array, "N K"],
    w_scale: Float[Array, "k n"] | Float[Array, "k N"],
    transposed: bool,
    out_dtype,
) -> Float[Array, "M N"]:
    """See ``api.fp8_matmul``; scales of w as w multiplies."""
    rows, columns = x.shape[0], w.shape[0 if transposed else 1]
    w_scale = scales_of_columns(w_scale, columns)
    tile = min(_ROWS, round_up(rows, 32)), min(_COLUMNS, round_up(columns, LANES))
    depth = _BLOCKS * BLOCK
    x = pad_axis(pad_axis(x, 0, tile[0]), 1, depth)
    w = pad_axis(pad_axis(w, 1 if transposed else 0, depth), 0 if transposed else 1, tile[1])
    x_scale = pad_axis(pad_axis(x_scale, 0, tile[0]), 1, _BLOCKS)
    w_scale = pad_axis(pad_axis(w_scale, 0, _BLOCKS), 1, tile[1])
    padded, steps = (x.shape[0], w_scale.shape[1]), x.shape[1] // depth
    w_spec = (
        pl.BlockSpec((tile[1], depth), lambda i, j, s: (j, s))
        if transposed
        else pl.BlockSpec((depth, tile[1]), lambda i, j, s: (s, j))
    )
    x_scale = x_scale.reshape(-1, steps, _BLOCKS).swapaxes(0, 1)  # a step's lie side by side
    y = pl.pallas_call(
        functools.partial(_kernel, transposed=transposed),
        grid=(padded[0] // tile[0], padded[1] // tile[1], steps),
        in_specs=[
            pl.BlockSpec((tile[0], depth), lambda i, j, s: (i, s)),
            pl.BlockSpec((1, tile[0], _BLOCKS), lambda i, j, s: (s, i, 0)),
            w_spec,
            pl.BlockSpec((_BLOCKS, tile[1]), lambda i, j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec(tile, lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM(tile, jnp.float32)],
        out_shape=jax.ShapeDtypeStruct(padded, out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(padded, x.shape[1], tile),
        name="fp8_matmul",
        interpret=tpu_interpreter(),
    )(x, x_scale, w, w_scale)
    return y[:rows, :columns]


def _cost(size: tuple[int, int], depth: int, tile: tuple[int, int]) -> pl.CostEstimate:
    area = size[0] * size[1]
    read = area * depth // tile[0] + area * depth // tile[1]
    return pl.CostEstimate(flops=2 * area * depth, transcendentals=0, bytes_accessed=read + 2 * area)


def _kernel(x, x_scale, w, w_scale, y, total, *, transposed: bool):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    for b in range(_BLOCKS):
        of_block = slice(b * BLOCK, (b + 1) * BLOCK)
        left, right = x[:, of_block], w[:, of_block] if transposed else w[of_block]
        left, right = (operand.astype(_operand_dtype()) for operand in (left, right))
        products = jax.lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)
        total[...] += products * x_scale[0, :, b : b + 1] * w_scale[b : b + 1]

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y[...] = total[...].astype(y.dtype)


def _operand_dtype() -> jnp.dtype:
    takes_e4m3 = not tpu_interpreter() and pltpu.get_tpu_info().fp8_ops_per_second > 0
    return jnp.dtype(jnp.float8_e4m3fn if takes_e4m3 else jnp.bfloat16)
