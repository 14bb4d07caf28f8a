"""What it costs on TPU that 32 neighbouring queries attend to the union of their keys: a question to ask of data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.blocks import pad_axis
from pallas_kernels.selection import BITS
from pallas_kernels.shapes import Array, Float, Int, UInt32


class UnionShare(NamedTuple):
    """Of a selection, in blocks of 32 queries; float32."""

    growth: Float[
        Array, ""
    ]  # keys of a block's union for each key that a query selected: 1 if they agree, 32 at most
    unwanted: Float[Array, ""]  # share of the computed pairs that no query selected


def union_share(selection: Int[Array, "B T K"] | UInt32[Array, "B W S"], queries: int) -> UnionShare:
    """``growth = mean_blocks |∪ S_t| / mean_queries |S_t|`` and ``unwanted = 1 - Σ |S_t| / Σ 32 |∪ S_t|``.

    The TPU's ``sparse_mla`` gathers a block's union once, so ``growth`` is what it gathers and multiplies for a query
    in proportion to what the query asked for; and of what it multiplies, ``unwanted`` is masked. A block that is not
    full costs as much as a full one. Not counted is that a union is filled up to whole tiles of keys. A selection
    of nothing has growth 1 and nothing unwanted. Takes both forms of a selection (``selection``); ``queries`` is T.

    Raises UnsupportedError for what is no selection of so many queries.
    """
    checks.selection_of("union_share", selection, selection.shape[0], queries)
    unions, selected = (_of_mask if selection.dtype == jnp.uint32 else _of_list)(selection)
    computed, wanted = BITS * jnp.sum(unions), jnp.sum(selected)
    growth = jnp.mean(unions) / (wanted / (selection.shape[0] * queries))
    nothing = wanted == 0
    return UnionShare(jnp.where(nothing, 1.0, growth), jnp.where(nothing, 0.0, 1 - wanted / computed))


def _of_mask(words: UInt32[Array, "B W S"]) -> tuple[Float[Array, "B W"], Float[Array, "B W"]]:
    """Keys of each block's union, and selected pairs of each block."""
    used = jnp.sum((words != 0).astype(jnp.float32), axis=-1)
    return used, jnp.sum(jax.lax.population_count(words).astype(jnp.float32), axis=-1)


def _of_list(indices: Int[Array, "B T K"]) -> tuple[Float[Array, "B W"], Float[Array, "B W"]]:
    """The same: a block's indices, sorted, are as many keys as there are first ones of equals."""
    # What is added is -1, no key: padding is of zeros.
    blocks = pad_axis(indices + 1, 1, BITS).reshape(indices.shape[0], -1, BITS * indices.shape[2]) - 1
    blocks = jnp.sort(blocks, axis=-1)
    before = jnp.pad(blocks[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=-1)
    used = jnp.sum((blocks != before).astype(jnp.float32), axis=-1)
    return used, jnp.sum((blocks >= 0).astype(jnp.float32), axis=-1)
