"""Which keys a query may see at all: not later ones, not padding, not other documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Array, Bool, Int


class Visibility(NamedTuple):
    """The limits of attention in a form that kernels can read a block at a time.

    A query sees a key whose index is not above its own and whose segment is the same. Segment 0 is padding:
    it is never seen, and its queries see nothing.
    """

    query_index: Int[Array, "B T"]  # where each query stands in the key sequence
    query_segment: Int[Array, "B T"]
    key_segment: Int[Array, "B S"]

    def mask(self) -> Bool[Array, "B T S"]:
        """True where the query may see the key. For one block of queries: the array is quadratic."""
        key_index = jnp.arange(self.key_segment.shape[-1], dtype=self.query_index.dtype)
        causal = key_index <= self.query_index[..., None]
        same_segment = self.query_segment[..., None] == self.key_segment[:, None, :]
        return causal & same_segment & (self.query_segment[..., None] != 0)

    def of_keys(self, first: Int[Array, ""], size: int) -> "Visibility":
        """The limits where only the ``size`` keys from ``first`` on are there."""
        segment = jax.lax.dynamic_slice_in_dim(self.key_segment, first, size, axis=1)
        return Visibility(self.query_index - first, self.query_segment, segment)
