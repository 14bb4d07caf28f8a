"""The grouped product on GPUs: a program for each tile of rows of one group and of columns, in Pallas's Triton backend.

XLA computes ``jax.lax.ragged_dot`` on GPUs for every pair of a row and a group. The kernels that jax ships unroll the
groups and need lengths that are multiples of their tiles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import pad_axis, power_of_two
from pallas_kernels.platform import UnsupportedError
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.triton import call, dot

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # of a tile, at most


class _Tiles(NamedTuple):
    """Which rows each program computes; behind the last group follow those that are zero."""

    group: Int[Array, "P"]
    first: Int[Array, "P"]
    end: Int[Array, "P"]  # of the group's rows
    steps: Int[Array, "P"]  # of the contraction


def product(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "G K N"] | Float[Array, "G N K"],
    sizes: Int[Array, "G"],
    transposed: bool,
    out_dtype,
    zero_behind: bool,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, or times its transpose. Zeros behind the last group."""
    columns = matrices.shape[1 if transposed else 2]
    tile = (
        min(_ROWS, power_of_two(rows.shape[0])),
        min(_COLUMNS, power_of_two(columns)),
        min(_DEPTH, power_of_two(rows.shape[1])),
    )
    depth_axis, column_axis = (2, 1) if transposed else (1, 2)
    padded = pad_axis(pad_axis(matrices, depth_axis, tile[2]), column_axis, tile[1])
    _refuse_large(padded)
    x = pad_axis(rows, 1, tile[2])
    tiles = _tiles(rows.shape[0], sizes, tile[0], x.shape[1] // tile[2])
    width = padded.shape[column_axis]
    (y,) = call(
        functools.partial(_product_kernel, tile=tile, transposed=transposed),
        [x, padded, *tiles],
        name="grouped_matmul",
        grid=(width // tile[1], tiles.group.shape[0]),
        # Behind the result, rows for what a tile computes past the end of its group.
        out_shape=[jax.ShapeDtypeStruct((rows.shape[0] + tile[0], width), out_dtype)],
        warps=8,
        stages=3,
        cost=_cost(rows.shape[0], x.shape[1], width),
    )
    return y[: rows.shape[0], :columns]


def outer_product(
    rows: Float[Array, "M K"], d_y: Float[Array, "M N"], sizes: Int[Array, "G"], out_dtype
) -> Float[Array, "G K N"]:
    """``Σ_m rows[m]ᵀ d_y[m]`` over the rows of each group."""
    depth, columns = rows.shape[1], d_y.shape[1]
    tile = min(_ROWS, power_of_two(depth)), min(_COLUMNS, power_of_two(columns)), _DEPTH
    rows, d_y = pad_axis(rows, 1, tile[0]), pad_axis(d_y, 1, tile[1])
    end = _ends(sizes, rows.shape[0])
    shape = jax.ShapeDtypeStruct((sizes.shape[0], rows.shape[1], d_y.shape[1]), out_dtype)
    _refuse_large(shape)
    (out,) = call(
        functools.partial(_outer_kernel, tile=tile),
        [rows, d_y, jnp.append(0, end[:-1]).astype(end.dtype), end],
        name="grouped_outer_product",
        grid=(shape.shape[1] // tile[0], shape.shape[2] // tile[1], sizes.shape[0]),
        out_shape=[shape],
        warps=8,
        stages=3,
        cost=_cost(rows.shape[0], rows.shape[1], d_y.shape[1]),
    )
    return out[:, :depth, :columns]


def _ends(sizes: Int[Array, "G"], rows: int) -> Int[Array, "G"]:
    """Where each group ends: never past the rows, whatever the sizes say."""
    return jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)


def _refuse_large(matrices: Array | jax.ShapeDtypeStruct) -> None:
    if matrices.size >= 1 << 31:
        raise UnsupportedError(
            f"grouped_matmul: matrices {list(matrices.shape)} have more than 2^31 elements, which the GPU kernel "
            "cannot address: spread the groups over more devices"
        )


def _cost(rows: int, depth: int, columns: int) -> pl.CostEstimate:
    read = 2 * rows * depth * -(-columns // _COLUMNS)
    return pl.CostEstimate(
        flops=2 * rows * depth * columns, transcendentals=0, bytes_accessed=read + 2 * rows * columns
    )


def _tiles(rows: int, sizes: Int[Array, "G"], tile: int, steps: int) -> _Tiles:
    """As many as the least favourable sizes need; those that are left over have no rows."""
    groups = sizes.shape[0]
    end = jnp.append(_ends(sizes, rows), rows)
    sizes = jnp.diff(end, prepend=0)
    last_tile = jnp.cumsum((sizes + tile - 1) // tile)
    place = jnp.arange(rows // tile + groups + 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last_tile, place, side="right"), groups).astype(jnp.int32)
    before = last_tile[group] - (sizes[group] + tile - 1) // tile
    first = end[group] - sizes[group] + tile * (place - before)
    has_matrix = group < groups
    return _Tiles(
        jnp.where(has_matrix, group, 0), first, end[group], jnp.where(has_matrix, jnp.int32(steps), 0)
    )


def _product_kernel(
    x, matrices, group, first, end, steps, y, *, tile: tuple[int, int, int], transposed: bool
):
    j, p = pl.program_id(0), pl.program_id(1)
    places, g = first[p] + jnp.arange(tile[0]), group[p]
    read = jnp.minimum(places, x.shape[0] - 1)
    columns = pl.ds(j * tile[1], tile[1])

    def add_step(s, total):
        depth = pl.ds(s * tile[2], tile[2])
        right = matrices[g, columns, depth].T if transposed else matrices[g, depth, columns]
        return total + dot(x[read, depth], right)

    total = jax.lax.fori_loop(0, steps[p], add_step, jnp.zeros(tile[:2], jnp.float32))
    past_the_end = x.shape[0] + jnp.arange(tile[0])
    y[jnp.where(places < end[p], places, past_the_end), columns] = total.astype(y.dtype)


def _outer_kernel(x, d_y, first, end, out, *, tile: tuple[int, int, int]):
    i, j, g = (pl.program_id(axis) for axis in range(3))
    depth, columns = pl.ds(i * tile[0], tile[0]), pl.ds(j * tile[1], tile[1])
    start, stop = first[g], end[g]

    def add_step(s, total):
        places = start + s * tile[2] + jnp.arange(tile[2])
        read = jnp.minimum(places, stop - 1)  # behind the last group there may be anything
        left = jnp.where((places < stop)[:, None], x[read, depth], 0)
        return total + dot(left.T, d_y[read, columns])

    steps = (stop - start + tile[2] - 1) // tile[2]
    total = jax.lax.fori_loop(0, steps, add_step, jnp.zeros(tile[:2], jnp.float32))
    out[g, depth, columns] = total.astype(out.dtype)
