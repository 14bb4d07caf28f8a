"""The contract of the grouped product: a loop over the groups that have rows, and blocks of their rows.

The last block of a group reaches over its end. What is not its own counts as zeros, and the next group, whose turn
comes later, writes over it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Array, Float, Int

_MOST_ROWS = 96  # in a block


def product(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "G K N"] | Float[Array, "G N K"],
    sizes: Int[Array, "G"],
    transposed: bool,
    out_dtype,
    zero_behind: bool,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, or times its transpose. Zeros behind the last group."""
    block = _block(rows, sizes)
    padded = jnp.pad(rows, ((0, block), (0, 0)))
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    first, end = _bounds(sizes)
    active = jnp.argsort(sizes == 0, stable=True)  # those with rows first

    def run_group(i, y):
        group = active[i]
        matrix = matrices[group]

        def run_block(y, start, own):
            x = jax.lax.dynamic_slice_in_dim(padded, start, block)
            part = jnp.where(own, _dot(x, matrix, contract), 0)
            return jax.lax.dynamic_update_slice_in_dim(y, part.astype(out_dtype), start, 0)

        return _over_blocks(run_block, y, first[group], end[group], block)

    y = jnp.zeros((padded.shape[0], matrices.shape[1 if transposed else 2]), out_dtype)
    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), run_group, y)[: rows.shape[0]]


def outer_product(
    rows: Float[Array, "M K"], d_y: Float[Array, "M N"], sizes: Int[Array, "G"], out_dtype
) -> Float[Array, "G K N"]:
    """``Σ_m rows[m]ᵀ d_y[m]`` over the rows of each group."""
    block = _block(rows, sizes)
    rows, d_y = (jnp.pad(array, ((0, block), (0, 0))) for array in (rows, d_y))

    def run_group(_, bounds):
        first, end = bounds

        def run_block(total, start, own):
            slices = (jax.lax.dynamic_slice_in_dim(array, start, block) for array in (rows, d_y))
            x, d = (jnp.where(own, array, 0) for array in slices)
            return total + _dot(x, d, (((0,), (0,)), ((), ())))

        total = jnp.zeros((rows.shape[1], d_y.shape[1]), jnp.float32)
        return None, _over_blocks(run_block, total, first, end, block).astype(out_dtype)

    return jax.lax.scan(run_group, None, _bounds(sizes))[1]


def _block(rows: Array, sizes: Array) -> int:
    """Half of what a group has on average, so that little is computed for nothing."""
    return min(_MOST_ROWS, max(8, rows.shape[0] // sizes.shape[0] // 2))


def _bounds(sizes: Int[Array, "G"]) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """First row of each group, and the one after its last."""
    end = jnp.cumsum(sizes)
    return end - sizes, end


def _over_blocks(body: Callable[..., Any], carry: Any, first: Array, end: Array, block: int) -> Any:
    """``carry = body(carry, start, own)`` for each block of a group; ``own`` [R, 1] tells which rows are its."""

    def step(i, carry):
        start = first + i * block
        own = start + jnp.arange(block) < end
        return body(carry, start, own[:, None])

    return jax.lax.fori_loop(0, (end - first + block - 1) // block, step, carry)


def _dot(a: Array, b: Array, contract) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)
