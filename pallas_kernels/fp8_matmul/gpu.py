"""The FP8 product on Hopper GPUs: e4m3 in the tensor cores, sums promoted to float32 every 128 of the contraction.

Pallas's Mosaic GPU backend: one warpgroup copies tiles of x, w and their scales to shared memory, two multiply 64 rows
each. A warpgroup's product of a block, [64, 128] in registers, is scaled and added to its sum while the other
warpgroup has the tensor cores. Arithmetic on all those numbers is what limits it, so where a block of w has one scale
it is multiplied with those of the rows first. Tensor cores read e4m3 along the contraction only, hence w as [N, K].

Tiles are taken in bands of a few rows of tiles: those that are computed at a time then share what they read.

Pallas's Triton backend takes the same product through 16-bit tensor-core instructions at half the speed: Triton
asks to be told that sums of e4m3 products may be imprecise, and Pallas has no way to tell it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blocks import pad_axis, round_up
from pallas_kernels.fp8_matmul.reference import BLOCK, scales_of_columns
from pallas_kernels.platform import UnsupportedError, gpu_interpreter
from pallas_kernels.shapes import Array, Float

_WARPGROUPS, _ROWS = 2, 64  # that multiply; rows of each
_BAND = 8  # rows of tiles
_COPYING_REGISTERS = 40  # a thread of the warpgroup that copies: what the others need not share


class _Plan(NamedTuple):
    """How to multiply where w has a scale for each block, or for each column of it."""

    by_block: bool
    columns: int  # of a tile, at most
    stages: int  # tiles in flight


_BY_BLOCK, _BY_COLUMN = _Plan(True, 128, 5), _Plan(False, 256, 4)


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
    plan = _BY_COLUMN if w_scale.shape[1] == columns else _BY_BLOCK
    w_scale = scales_of_columns(w_scale, columns)  # what is copied to shared memory has 16 bytes at least
    tile = _WARPGROUPS * _ROWS, min(plan.columns, round_up(columns, BLOCK))
    w = w if transposed else w.T
    x = pad_axis(pad_axis(x, 0, tile[0]), 1, BLOCK)
    w = pad_axis(pad_axis(w, 0, tile[1]), 1, BLOCK)
    x_scale, w_scale = pad_axis(x_scale, 0, tile[0]).T, pad_axis(w_scale, 1, tile[1])
    if gpu_interpreter():
        w = w.T  # the interpreter has no transposed operands
    multiply = _kernel(tile, plan, (x.shape[0], w_scale.shape[1]), out_dtype)
    return multiply(x, w, x_scale, w_scale)[:rows, :columns]


def _kernel(tile: tuple[int, int], plan: _Plan, size: tuple[int, int], out_dtype):
    """The product of whole tiles."""
    plgpu = _mosaic_gpu()
    tiles = size[0] // tile[0], size[1] // tile[1]
    out_columns = (
        64 if jnp.dtype(out_dtype).itemsize == 2 else 32
    )  # 128 bytes, which shared memory spreads out

    def body(x, w, x_scale, w_scale, y):
        group, (i, j) = lax.axis_index("warpgroup"), _in_bands(lax.axis_index("tile"), *tiles)
        rows = pl.ds(group * _ROWS, _ROWS)

        def add_block(_, x_tile, w_tile, x_scale_tile, w_scale_tile, totals):
            of_rows, added = x_scale_tile[0, rows], []
            for part, total in enumerate(totals):
                columns = pl.ds(part * BLOCK, BLOCK)
                products = _product(plgpu, x_tile.at[rows], w_tile, columns)
                if plan.by_block:
                    factor = of_rows * w_scale_tile[0, part * BLOCK]
                    products *= lax.broadcast_in_dim(factor, products.shape, (0,))
                else:
                    products *= lax.broadcast_in_dim(of_rows, products.shape, (0,))
                    products *= lax.broadcast_in_dim(w_scale_tile[0, columns], products.shape, (1,))
                added.append(total + products)
            return tuple(added)

        def pipeline(step, context):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(x.shape[1] // BLOCK,),
                in_specs=_specs(plgpu, tile, i, j),
                max_concurrent_steps=plan.stages,
                memory_registers=_COPYING_REGISTERS,
                wg_axis="warpgroup",
                num_compute_wgs=_WARPGROUPS,
                compute_context=context,
            )

        def with_memory(out, allocations):
            def compute(run):
                totals = run((_zeros(plgpu),) * (tile[1] // BLOCK))
                for part, total in enumerate(totals):
                    for start in range(0, BLOCK, out_columns):
                        out[group] = total[:, start : start + out_columns].astype(out_dtype)
                        plgpu.commit_smem()
                        columns = pl.ds(j * tile[1] + part * BLOCK + start, out_columns)
                        target = y.at[pl.ds(i * tile[0] + group * _ROWS, _ROWS), columns]
                        plgpu.copy_smem_to_gmem(out.at[group], target)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            pipeline(add_block, compute)(x, w, x_scale, w_scale, allocations=allocations)

        def nothing(*_):
            return None

        pl.run_scoped(
            with_memory,
            plgpu.SMEM((_WARPGROUPS, _ROWS, out_columns), out_dtype, transforms=_swizzle(plgpu, out_columns)),
            pipeline(nothing, nothing).get_allocations(x, w, x_scale, w_scale),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(size, out_dtype),
        grid=(tiles[0] * tiles[1],),
        grid_names=("tile",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="fp8_matmul",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=_interpreter(),
    )


def _in_bands(place: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Row and column of a tile: down the rows of a band, then on to the next column; the last band may be lower."""
    band, inside = place // (_BAND * columns), place % (_BAND * columns)
    height = jnp.minimum(_BAND, rows - band * _BAND)
    return band * _BAND + inside % height, inside // height


def _specs(plgpu, tile: tuple[int, int], i: Array, j: Array) -> list:
    """Of x, w and their scales: what a block of the contraction reads."""
    if gpu_interpreter():
        w = plgpu.BlockSpec((BLOCK, tile[1]), lambda b: (b, j))
    else:
        w = plgpu.BlockSpec((tile[1], BLOCK), lambda b: (j, b), transforms=_swizzle(plgpu, BLOCK))
    return [
        plgpu.BlockSpec((tile[0], BLOCK), lambda b: (i, b), transforms=_swizzle(plgpu, BLOCK)),
        w,
        plgpu.BlockSpec((1, tile[0]), lambda b: (b, i)),
        plgpu.BlockSpec((1, tile[1]), lambda b: (b, j)),
    ]


def _swizzle(plgpu, row: int) -> tuple:
    """How rows of 128 bytes lie in shared memory, so that no bank is asked twice at once."""
    return plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(128)


def _product(plgpu, x, w, columns) -> Float[Array, "64 128"]:
    """Through the tensor cores, from shared memory to registers."""
    right = w.at[:, columns] if gpu_interpreter() else plgpu.transpose_ref(w.at[columns], (1, 0))

    def multiply(total):
        plgpu.wgmma(total, x, right)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((_ROWS, BLOCK), jnp.float32))


def _zeros(plgpu) -> Float[Array, "64 128"]:
    zeros = jnp.zeros((_ROWS, BLOCK), jnp.float32)
    return zeros if gpu_interpreter() else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)


def _mosaic_gpu():
    """Pallas's Mosaic GPU backend: imported where it is needed, as it asks for more than jax."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise UnsupportedError(
            f"fp8_matmul: the GPU kernel needs Pallas's Mosaic GPU backend, which lacks {error.name!r} here: pip "
            "install absl-py, or name the implementation 'reference'"
        ) from error
    return mosaic_gpu


def _interpreter():
    """What a Mosaic GPU kernel passes as ``interpret``."""
    if not gpu_interpreter():
        return False
    # Public from jax 0.12 on only.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
