"""The contract of masked multi-head attention, in plain jnp: over a block of keys after another.

Scores of all keys at once would have to be written to memory and read several times; those of some heads and a block
of keys stay in the cache, and blocks that no query may see are passed over.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.accumulate import einsum, wide
from pallas_kernels.blocks import over_seen_keys, pad_axis, pad_visibility
from pallas_kernels.residuals import LSE, OUTPUT
from pallas_kernels.selection import unpack_mask
from pallas_kernels.shapes import Array, Bool, Float, Int, UInt32
from pallas_kernels.softmax import exp_minus, output_delta
from pallas_kernels.visibility import Visibility

_KEYS = 1024  # of a block
_SCORES = 1 << 20  # at a time: 4 MB


def masked_scores(
    q: Float[Array, "B H T Q"], k: Float[Array, "B H S Q"], mask: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B H T S"]:
    """``scale · q kᵀ`` in float32, -inf where masked.

    The mask is added as its logarithm, 0 or -inf: XLA on CPUs computes logarithms once, where it would derive the mask
    again for every head.
    """
    scores = einsum("bhtq,bhsq->bhts", q, k)
    bias = jnp.log(mask.astype(scores.dtype))
    return scores * scale + bias[:, None]


def dense_mla(
    q: Float[Array, "B H T Q"],
    k: Float[Array, "B H S Q"],
    v: Float[Array, "B H S V"],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None = None,
    *,
    scale: float,
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H T"]]:
    """See ``api.dense_mla``."""
    return _attend(q, k, v, visibility, selected, scale)


def attended(visibility: Visibility, selected: UInt32[Array, "B W S"] | None) -> Bool[Array, "B T S"]:
    """True where the query attends to the key."""
    if selected is None:
        return visibility.mask()
    return unpack_mask(selected, visibility.query_index.shape[1])


class KeyBlocks(NamedTuple):
    """What belongs to the keys of some sequences and heads, a block of keys at a time."""

    arrays: tuple[Float[Array, "B H S X"], ...]  # of all of them
    visibility: Visibility  # of these sequences
    selected: UInt32[Array, "B W S"] | None
    size: int  # keys of a block; their number is a multiple
    heads: int
    first_sequence: Int[Array, ""] | int = 0
    first_head: Int[Array, ""] | int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, heads, and keys with the padding."""
        return self.visibility.query_index.shape[0], self.heads, self.visibility.key_segment.shape[1]

    def at(self, first: Int[Array, ""]) -> tuple[Array, ...]:
        """The arrays of the block that begins at key ``first``, and who attends to its keys."""
        place = self.first_sequence, self.first_head, first, 0
        blocks = (
            jax.lax.dynamic_slice(x, place, (*self.shape[:2], self.size, x.shape[3])) for x in self.arrays
        )
        selected = self.selected
        if selected is not None:
            selected = jax.lax.dynamic_slice_in_dim(selected, first, self.size, axis=2)
        return *blocks, attended(self.visibility.of_keys(first, self.size), selected)

    def over(self, step: Callable[..., Any], carry: Any) -> Any:
        """``carry = step(first, carry)`` for each block that anybody may see."""
        return over_seen_keys(step, carry, self.visibility, self.size)


def by_heads(
    function: Callable[..., Any],
    queries: tuple[Float[Array, "B H T ..."], ...],
    keys: tuple[Float[Array, "B H S X"], ...],
    visibility: Visibility,
    selected: UInt32[Array, "B W S"] | None,
) -> Any:
    """``function(queries, blocks of keys)`` for some heads of one sequence at a time; for all if their scores are few.

    Zeros are added behind the keys, which nobody sees, so that all blocks are whole.
    """
    (batch, heads, length), size = queries[0].shape[:3], min(_KEYS, keys[0].shape[2])
    keys = tuple(pad_axis(x, 2, size) for x in keys)
    visibility = pad_visibility(visibility, 1, size)
    selected = None if selected is None else pad_axis(selected, 2, size)
    if batch * heads * length * size <= _SCORES:
        return function(queries, KeyBlocks(keys, visibility, selected, size, heads))
    most = max(1, _SCORES // (length * size))
    group = next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)

    def of_group(number_and_queries):
        number, queries = number_and_queries
        sequence, head = number // (heads // group), number % (heads // group) * group
        limits, mask = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, sequence, 1), (visibility, selected)
        )
        return function(queries, KeyBlocks(keys, limits, mask, size, group, sequence, head))

    groups = tuple(x.reshape(-1, 1, group, *x.shape[2:]) for x in queries)
    results = jax.lax.map(of_group, (jnp.arange(len(groups[0]), dtype=jnp.int32), groups))
    return jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, visibility, selected, scale) -> tuple[Array, Array]:
    return _attend_all(q, k, v, visibility, selected, scale)


def _attend_all(q, k, v, visibility, selected, scale) -> tuple[Array, Array]:
    return by_heads(functools.partial(_attend_some, scale=scale), (q,), (k, v), visibility, selected)


def _attend_some(queries: tuple[Array], blocks: KeyBlocks, *, scale: float) -> tuple[Array, Array]:
    (q,) = queries

    def attend_keys(first, state):
        total, highest_before, sums = state
        k, v, mask = blocks.at(first)
        scores = masked_scores(q, k, mask, scale)
        highest = jnp.maximum(highest_before, jnp.max(scores, axis=-1))
        finite = jnp.where(jnp.isfinite(highest), highest, 0)
        p, shrink = jnp.exp(scores - finite[..., None]), jnp.exp(highest_before - finite)
        total = total * shrink[..., None] + einsum("bhts,bhsv->bhtv", p.astype(v.dtype), v)
        return total, highest, sums * shrink + jnp.sum(p, axis=-1)

    statistics, dtype = q.shape[:3], wide(q.dtype)
    start = (
        jnp.zeros((*statistics, blocks.arrays[1].shape[3]), dtype),
        jnp.full(statistics, -jnp.inf, dtype),
        jnp.zeros(statistics, dtype),
    )
    total, highest, sums = blocks.over(attend_keys, start)
    o = total / jnp.where(sums == 0, 1, sums)[..., None]
    return o.astype(blocks.arrays[1].dtype), jnp.log(sums) + jnp.where(sums == 0, 0, highest)


def _forward(q, k, v, visibility, selected, scale):
    o, lse = _attend_all(q, k, v, visibility, selected, scale)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, LSE)
    return (o, lse), (q, k, v, visibility, selected, o, lse)


def _backward(scale, residuals, gradients):
    q, k, v, visibility, selected, o, lse = residuals
    d_o, d_lse = gradients
    queries = q, lse, d_o, output_delta(o, d_o, d_lse)
    differentiate = functools.partial(_differentiate_some, scale=scale)
    d_q, d_k, d_v = by_heads(differentiate, queries, (k, v), visibility, selected)
    return d_q, d_k[:, :, : k.shape[2]], d_v[:, :, : v.shape[2]], None, None


def _differentiate_some(queries: tuple[Array, ...], blocks: KeyBlocks, *, scale: float) -> tuple[Array, ...]:
    """The gradients of queries, keys and values, of all keys."""
    q, lse, d_o, delta = queries
    # Everything as the products like it, tokens last; XLA on CPUs would undo it, at half the speed.
    q_t, d_o_t = jax.lax.optimization_barrier((q.swapaxes(2, 3), d_o.swapaxes(2, 3)))

    def differentiate_keys(first, gradients):
        d_q, d_k_t, d_v_t = gradients
        k, v, mask = blocks.at(first)
        p = exp_minus(masked_scores(q, k, mask, scale), lse)
        d_p = einsum("bhtv,bhsv->bhts", d_o, v)
        d_scores = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
        d_k_t, d_v_t = (
            jax.lax.dynamic_update_slice_in_dim(whole, block.astype(whole.dtype), first, axis=3)
            for whole, block in (
                (d_k_t, einsum("bhqt,bhts->bhqs", q_t, d_scores)),
                (d_v_t, einsum("bhvt,bhts->bhvs", d_o_t, p.astype(d_o.dtype))),
            )
        )
        return d_q + einsum("bhts,bhsq->bhtq", d_scores, k), d_k_t, d_v_t

    sequences, heads, keys = blocks.shape
    transposed = (jnp.zeros((sequences, heads, x.shape[3], keys), x.dtype) for x in blocks.arrays)
    d_q, d_k_t, d_v_t = blocks.over(differentiate_keys, (jnp.zeros(q.shape, wide(q.dtype)), *transposed))
    d_k_t, d_v_t = jax.lax.optimization_barrier((d_k_t, d_v_t))
    return d_q.astype(q.dtype), d_k_t.swapaxes(2, 3), d_v_t.swapaxes(2, 3)


_attend.defvjp(_forward, _backward)
