"""The contract of the grouped product, as a loop over blocks of rows that each belong to one group.

A group is cut into whole blocks and then into small ones for what remains, so that few rows are computed for
nothing. A block that reaches over the end of its group, or of the array, writes only the rows that are its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_WHOLE, _SMALL = 128, 32  # rows a block: measured best on CPU for 256 rows a group


class _Blocks(NamedTuple):
    """Blocks of one size, in the order of the groups."""

    rows: int
    number: Int[Array, ""]
    group: Int[Array, "blocks"]
    start: Int[Array, "blocks"]  # first row
    end: Int[Array, "blocks"]  # end of the group


def _cut(group_sizes: Int[Array, "E"], num_rows: int) -> list[_Blocks]:
    """The whole blocks of all groups, and the small ones."""
    small = min(_SMALL, max(8, num_rows // group_sizes.shape[0]), num_rows)
    whole = min(_WHOLE, num_rows)
    whole_each = group_sizes // whole if whole > small else jnp.zeros_like(group_sizes)
    first = jnp.cumsum(group_sizes) - group_sizes
    rest_first = first + whole_each * whole
    rest_each = (group_sizes - whole_each * whole + small - 1) // small
    groups = group_sizes.shape[0]
    most_small = min(num_rows, groups * -(-whole // small) if whole > small else num_rows // small + groups)
    blocks = [_listed(small, rest_each, rest_first, group_sizes, most_small)]
    if whole > small:
        blocks.append(_listed(whole, whole_each, first, group_sizes, num_rows // whole))
    return blocks


def _listed(rows: int, each: Array, first: Array, group_sizes: Array, most: int) -> _Blocks:
    """``each[e]`` blocks for group e, from row ``first[e]`` on."""
    last = jnp.cumsum(each)
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, number, side="right"), each.shape[0] - 1).astype(jnp.int32)
    start = first[group] + (number - (last - each)[group]) * rows
    return _Blocks(rows, last[-1], group, start, jnp.cumsum(group_sizes)[group])


def _over(blocks: _Blocks, num_rows: int, body: Callable[..., Array], carry: Array) -> Array:
    """``carry = body(carry, group, first row, which rows are the block's own)`` for every block."""

    def step(i, carry):
        # At the end of the array a block is moved back, so that it lies inside.
        position = jnp.minimum(blocks.start[i], num_rows - blocks.rows)
        row = position + jnp.arange(blocks.rows)[:, None]
        own = (row >= blocks.start[i]) & (row < blocks.end[i])
        return body(carry, blocks.group[i], position, own)

    return jax.lax.fori_loop(0, blocks.number, step, carry)


def _multiply(lhs: Array, rhs: Array, group_sizes: Array, *, transposed: bool) -> Array:
    """``lhs[m] @ rhs[e]``, or ``lhs[m] @ rhs[e].T``."""
    num_rows = lhs.shape[0]
    out = jnp.zeros((num_rows, rhs.shape[1 if transposed else 2]), lhs.dtype)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    for blocks in _cut(group_sizes, num_rows):

        def body(out, group, position, own, rows=blocks.rows):
            x = jax.lax.dynamic_slice_in_dim(lhs, position, rows)
            matrix = jax.lax.dynamic_index_in_dim(rhs, group, keepdims=False)
            y = jax.lax.dot_general(x, matrix, contract, preferred_element_type=jnp.float32)
            others = jax.lax.dynamic_slice_in_dim(out, position, rows)
            return jax.lax.dynamic_update_slice_in_dim(
                out, jnp.where(own, y.astype(out.dtype), others), position, 0
            )

        out = _over(blocks, num_rows, body, out)
    return out


def _gradient_of_rhs(lhs: Array, d_out: Array, group_sizes: Array, rhs: Array) -> Array:
    num_rows, total = lhs.shape[0], jnp.zeros(rhs.shape, jnp.float32)
    for blocks in _cut(group_sizes, num_rows):

        def body(total, group, position, own, rows=blocks.rows):
            x = jax.lax.dynamic_slice_in_dim(lhs, position, rows)
            d = jnp.where(own, jax.lax.dynamic_slice_in_dim(d_out, position, rows), 0)
            return total.at[group].add(jnp.matmul(x.T, d, preferred_element_type=jnp.float32))

        total = _over(blocks, num_rows, body, total)
    return total.astype(rhs.dtype)


@jax.custom_vjp
def grouped_matmul(
    lhs: Float[Array, "M K"], rhs: Float[Array, "E K N"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M N"]:
    """See ``api.grouped_matmul``."""
    return _multiply(lhs, rhs, group_sizes, transposed=False)


def _forward(lhs, rhs, group_sizes):
    return grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals, d_out):
    lhs, rhs, group_sizes = residuals
    d_lhs = _multiply(d_out, rhs, group_sizes, transposed=True)
    return d_lhs, _gradient_of_rhs(lhs, d_out, group_sizes, rhs), None


grouped_matmul.defvjp(_forward, _backward)
