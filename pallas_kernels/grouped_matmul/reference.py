"""The contract of the grouped product, as a loop over blocks of rows that each belong to one group.

A block starts anywhere inside its group and may run past its end, into rows of the groups after it. Those rows
are computed with the wrong matrix there and written again, rightly, by the later groups' own blocks, so no
padding and no mask is needed in the forward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Rows a block: large enough for an efficient product, small enough to waste little of a group's last one."""
    mean_rows = max(1, num_rows // num_groups)
    return min(128, max(8, 1 << (mean_rows - 1).bit_length() >> 1))


def _blocks(group_sizes: Int[Array, "E"], num_rows: int, block: int) -> tuple[Array, Array, Array, Array]:
    """How many blocks there are and, for each, its group, its first row and the end of its group."""
    blocks_each = (group_sizes + block - 1) // block
    last_block = jnp.cumsum(blocks_each)
    group_end = jnp.cumsum(group_sizes)
    most = num_rows // block + group_sizes.shape[0]
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last_block, number, side="right").astype(jnp.int32)
    group = jnp.minimum(group, group_sizes.shape[0] - 1)
    within = number - (last_block - blocks_each)[group]
    start = (group_end - group_sizes)[group] + within * block
    return last_block[-1], group, start, group_end[group]


def _padded(rows: Float[Array, "M X"], block: int) -> Float[Array, "M+block X"]:
    return jnp.pad(rows, ((0, block), (0, 0)))


def _forward(lhs, rhs, group_sizes):
    block = _block_rows(lhs.shape[0], rhs.shape[0])
    count, group, start, _ = _blocks(group_sizes, lhs.shape[0], block)
    rows = _padded(lhs, block)

    def multiply(i, out):
        x = jax.lax.dynamic_slice_in_dim(rows, start[i], block)
        matrix = jax.lax.dynamic_index_in_dim(rhs, group[i], keepdims=False)
        y = jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(lhs.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start[i], axis=0)

    out = jnp.zeros((rows.shape[0], rhs.shape[-1]), lhs.dtype)
    out = jax.lax.fori_loop(0, count, multiply, out)
    total = jnp.sum(group_sizes)
    return jnp.where(jnp.arange(lhs.shape[0])[:, None] < total, out[: lhs.shape[0]], 0)


def _gradient_of_rhs(lhs, d_out, group_sizes, rhs):
    block = _block_rows(lhs.shape[0], rhs.shape[0])
    count, group, start, end = _blocks(group_sizes, lhs.shape[0], block)
    rows, d_rows = _padded(lhs, block), _padded(d_out, block)

    def accumulate(i, total):
        x = jax.lax.dynamic_slice_in_dim(rows, start[i], block)
        d = jax.lax.dynamic_slice_in_dim(d_rows, start[i], block)
        d = jnp.where((start[i] + jnp.arange(block))[:, None] < end[i], d, 0)
        product = jnp.matmul(x.T, d, preferred_element_type=jnp.float32)
        return total.at[group[i]].add(product)

    total = jax.lax.fori_loop(0, count, accumulate, jnp.zeros(rhs.shape, jnp.float32))
    return total.astype(rhs.dtype)


@functools.partial(jax.custom_vjp)
def grouped_matmul(
    lhs: Float[Array, "M K"], rhs: Float[Array, "E K N"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M N"]:
    """See ``api.grouped_matmul``."""
    return _forward(lhs, rhs, group_sizes)


def _grouped_matmul_fwd(lhs, rhs, group_sizes):
    return _forward(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _grouped_matmul_bwd(residuals, d_out):
    lhs, rhs, group_sizes = residuals
    d_lhs = _forward(d_out.astype(lhs.dtype), rhs.swapaxes(1, 2), group_sizes)
    return d_lhs, _gradient_of_rhs(lhs, d_out, group_sizes, rhs), None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
