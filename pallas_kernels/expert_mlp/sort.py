"""(token, expert) pairs in the order of their experts."""

import jax.numpy as jnp

from pallas_kernels.shapes import Array, Int


def count(experts: Int[Array, "N K"], num_experts: int) -> Int[Array, "E"]:
    """How many pairs each expert has."""
    return jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)


def sort_by_expert(experts: Int[Array, "N K"]) -> Int[Array, "N*K"]:
    """The pairs, numbered row by row, in the order of their experts and then of their number."""
    return jnp.argsort(experts.reshape(-1), stable=True)
