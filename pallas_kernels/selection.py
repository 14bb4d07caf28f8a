"""The two forms of a selection of keys, and how the second is packed.

A list: int32 indices [B, T, K], ascending, -1 in the places that stay empty. What a gather reads: CPU and GPU.

A packed mask: uint32 words [B, W, S] with W = ceil(T / 32). Bit ``t % 32`` of ``words[b, t // 32, s]`` says that
query t selected key s. One bit a pair, and all that a block of 32 queries wants of a key in one word: TPU, and
masked attention everywhere.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.platform import UnsupportedError
from pallas_kernels.shapes import Array, Bool, Int, UInt32

BITS = 32  # queries a word


def pack_mask(mask: Bool[Array, "B T S"]) -> UInt32[Array, "B W S"]:
    """The packed form of a mask; queries past the last select nothing."""
    batch, queries, keys = mask.shape
    words = -(-queries // BITS)
    mask = jnp.pad(mask, [(0, 0), (0, words * BITS - queries), (0, 0)]).reshape(batch, words, BITS, keys)
    place = jnp.arange(BITS, dtype=jnp.uint32)[:, None]
    return jnp.sum(mask.astype(jnp.uint32) << place, axis=2, dtype=jnp.uint32)


def unpack_mask(words: UInt32[Array, "B W S"], queries: int) -> Bool[Array, "B T S"]:
    """The mask of the first ``queries`` queries."""
    place = jnp.arange(BITS, dtype=jnp.uint32)[:, None]
    mask = (jax.lax.expand_dims(words, [2]) >> place) & 1
    return mask.reshape(words.shape[0], -1, words.shape[-1])[:, :queries].astype(bool)


def in_tiles(indices: Int[Array, "B T K"], tile: int) -> tuple[Int[Array, "B T L"], Int[Array, "B T"]]:
    """A list of whole tiles, -1 behind, and how many of its places there are up to the last that is not empty."""
    indices = jnp.pad(indices, [(0, 0), (0, 0), (0, -indices.shape[2] % tile)], constant_values=-1)
    place = jnp.arange(1, indices.shape[2] + 1, dtype=jnp.int32)
    return indices, jnp.max(jnp.where(indices >= 0, place, 0), axis=-1)


def require_list(op: str, selection: Array) -> None:
    """Raises UnsupportedError unless the selection is a list."""
    if selection.dtype != jnp.int32:
        raise UnsupportedError(
            f"{op}: this implementation reads a selection as a list of int32 indices [B, T, K], and it was given "
            f"{selection.dtype}{list(selection.shape)}: make it with topk.select or topk.topk_indices"
        )


def require_mask(op: str, selection: Array, queries: int, keys: int) -> None:
    """Raises UnsupportedError unless the selection is a packed mask of so many queries and keys."""
    words = -(-queries // BITS)
    if selection.dtype != jnp.uint32 or selection.shape[1:] != (words, keys):
        raise UnsupportedError(
            f"{op}: this implementation reads a selection as a packed mask, uint32[B, {words}, {keys}] for {queries} "
            f"queries and {keys} keys, and it was given {selection.dtype}{list(selection.shape)}: make it with "
            "topk.select or topk.topk_mask"
        )
