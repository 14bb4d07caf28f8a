"""The grouped product on TPU through megablox, which jax ships.

``jax.lax.ragged_dot`` is the same kernel for the product, but XLA turns the matrices over in memory for the gradient
of the rows, and computes that of the matrices for every pair of a row and a group.
"""

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels.blocks import pad_axis, round_up
from pallas_kernels.platform import tpu_interpreter
from pallas_kernels.shapes import Array, Float, Int

_MOST_ROWS, _LEAST_ROWS, _WIDTH = 512, 128, 1024  # of a tile
_MOST_ROWS_OF_FLOAT32 = 256


def product(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "G K N"] | Float[Array, "G N K"],
    sizes: Int[Array, "G"],
    transposed: bool,
    out_dtype,
    zero_behind: bool,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, or times its transpose."""
    tile = _tile(rows.shape, matrices.shape[1 if transposed else 2], sizes)
    with _precision(rows):
        y = gmm(
            pad_axis(rows, 0, tile[0]),
            matrices,
            sizes,
            preferred_element_type=out_dtype,
            tiling=tile,
            transpose_rhs=transposed,
            interpret=bool(tpu_interpreter()),
        )
    y = y[: rows.shape[0]]
    if not zero_behind:
        return y
    behind = jnp.arange(rows.shape[0]) >= jnp.sum(sizes)  # the kernel leaves these as they were
    return jnp.where(behind[:, None], 0, y)


def outer_product(
    rows: Float[Array, "M K"], d_y: Float[Array, "M N"], sizes: Int[Array, "G"], out_dtype
) -> Float[Array, "G K N"]:
    """``Σ_m rows[m]ᵀ d_y[m]`` over the rows of each group."""
    tile = _tile(rows.shape, d_y.shape[1], sizes)
    # Two tiles of the result and their sums lie in 16 MB of VMEM with the operands.
    if out_dtype == jnp.float32:
        tile = min(tile[0], _MOST_ROWS_OF_FLOAT32), *tile[1:]
    rows, d_y = pad_axis(rows, 0, tile[0]), pad_axis(d_y, 0, tile[0])
    with _precision(rows):
        return tgmm(
            rows.T,
            d_y,
            sizes,
            preferred_element_type=out_dtype,
            tiling=tile,
            interpret=bool(tpu_interpreter()),
        )


def _tile(size: tuple[int, ...], columns: int, sizes: Array) -> tuple[int, int, int]:
    """A tile of rows is computed once for each group in it: no more rows than a group has on average."""
    per_group = max(size[0] // sizes.shape[0], 1)
    most = min(_MOST_ROWS, max(_LEAST_ROWS, 1 << (per_group.bit_length() - 1)))
    return min(most, round_up(size[0], 16)), min(_WIDTH, size[1]), min(_WIDTH, columns)


def _precision(rows: Array):
    """Float32 operands are not rounded."""
    return jax.default_matmul_precision("highest") if rows.dtype == jnp.float32 else contextlib.nullcontext()
