"""Self-attention a block of queries at a time, so that nothing quadratic in the length is ever stored."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.platform import target
from pallas_kernels.residuals import LSE, OUTPUT, SELECTION

PyTree = Any

# A query of the first quarter of a sequence needs no key of the other three: each stretch of queries sees a
# prefix of the keys. Four stretches compute 62 % of the square, and compile four loop bodies.
_STRETCHES = 4

# Short sequences come in several blocks too, so that stretches spare what they can, but in none so small that its
# products are slow. Accelerators have one for each stretch: gradients of keys are added up block by block.
_LEAST_BLOCKS = {"cpu": 8, "gpu": _STRETCHES, "tpu": _STRETCHES}
_LEAST_QUERIES = 128

# What the backward pass of attention does not compute again.
KEPT = jax.checkpoint_policies.save_only_these_names(SELECTION, OUTPUT, LSE)


def map_causal_blocks(
    function: Callable[[PyTree, PyTree], PyTree],
    queries: PyTree,
    keys_up_to: Callable[[int], PyTree],
    *,
    block: int,
    stretches: int = _STRETCHES,
) -> PyTree:
    """``function(queries of one block, keys up to its end or later)`` over all blocks, joined along the tokens.

    A block has ``block`` queries, or fewer in a short sequence. Leaves of ``queries`` are [B, T, ...], those of the
    result too, or [B, T/n, ...] with one row for n queries, where n divides a block; ``keys_up_to(n)`` gives the first
    n keys. With one stretch it is asked for the number of queries only, and every block is given the same keys: for
    queries that are not all of a sequence's. Only what ``KEPT`` names lives from a block's forward to its backward
    pass, and all of it is linear in T but the selection: k indices a query, or one bit a key.
    """
    length = jax.tree.leaves(queries)[0].shape[1]
    least_blocks = _LEAST_BLOCKS[target()] if stretches > 1 else 1
    block = min(block, max(_LEAST_QUERIES, length // least_blocks), length)
    blocks = -(-length // block)
    # The barrier keeps jaxlib 0.12.0 on CPUs from fusing bfloat16 products with the padding, which crashes.
    queries = jax.lax.optimization_barrier(_pad_tokens(queries, blocks * block - length))
    function = jax.checkpoint(function, policy=KEPT)
    results = []
    for first, last in _stretches(blocks, stretches):
        stretch = _take_tokens(queries, first * block, last * block)
        keys = keys_up_to(min(last * block, length))
        results.append(_map_blocks(function, stretch, keys, last - first))

    def joined(*parts: jax.Array) -> jax.Array:
        rows = jnp.concatenate(parts, axis=1)
        return rows[:, : -(-length // (blocks * block // rows.shape[1]))]

    return jax.tree.map(joined, *results)


def _stretches(blocks: int, most: int) -> list[tuple[int, int]]:
    stretches = min(most, blocks)
    borders = [round(i * blocks / stretches) for i in range(stretches + 1)]
    return list(itertools.pairwise(borders))


def _map_blocks(function, queries: PyTree, keys: PyTree, blocks: int) -> PyTree:
    if blocks == 1:
        return function(queries, keys)
    split = jax.tree.map(lambda x: x.reshape(x.shape[0], blocks, -1, *x.shape[2:]).swapaxes(0, 1), queries)
    results = jax.lax.map(lambda block_queries: function(block_queries, keys), split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), results)


def _take_tokens(tree: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, min(stop, x.shape[1]), axis=1), tree)


def _pad_tokens(tree: PyTree, amount: int) -> PyTree:
    def pad(x):
        return jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(pad, tree) if amount else tree
