"""Blocks of queries, joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.models.causal_blocks import map_causal_blocks
from pallas_kernels.selection import BITS


def packed(mask: jax.Array) -> jax.Array:
    """[B, T, S] as [B, T/32, S] words, as kernels for TPUs take a selection."""
    mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % BITS), (0, 0)))
    bits = mask.astype(jnp.uint32).reshape(mask.shape[0], -1, BITS, mask.shape[2])
    return jnp.sum(bits << jnp.arange(BITS, dtype=jnp.uint32)[:, None], axis=2, dtype=jnp.uint32)


@pytest.mark.parametrize("length", [20, 128, 230, 320, 385])
def test_words_of_queries_are_joined(length):
    """With one stretch, whatever is left over at the end of the last block: of padding nothing is selected."""
    chosen = np.random.RandomState(length).uniform(size=(2, length, 40)) < 0.3

    def select(block: jax.Array, keys: jax.Array) -> jax.Array:
        return packed(block & keys)

    keys = jnp.ones((2, 1, 40), bool)
    found = map_causal_blocks(select, jnp.asarray(chosen), lambda _: keys, block=128, stretches=1)
    np.testing.assert_array_equal(found, packed(jnp.asarray(chosen)))
