"""The chosen experts where rows go to the devices that have them: dropless, in rounds of a bounded size."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsjax.parallel.collectives import gather, part_of_sum, whole
from dsjax.parallel.exchange import Exchange, Round, send
from dsjax.parallel.rules import Axes
from pallas_kernels.expert_mlp.sort import count, sort_by_expert
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_outer_product

_LANES = 128  # of a TPU's tile
Matrices = tuple[Array, Array, Array]  # gate and up [E/n, D, F], down [E/n, F, D]; of D this device's part


class How(NamedTuple):
    """The group of devices that share experts, what each takes in a round, and how a device's matrices lie."""

    names: Axes
    capacity: int
    up_lies: PartitionSpec
    down_lies: PartitionSpec


def experts_in_rounds(
    how: How,
    x: Float[Array, "N D"],
    experts: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    matrices: Matrices,
) -> Float[Array, "N D"]:
    """``expert_mlp`` of this device's tokens, rounded once to their dtype; to be called by each device of the group.

    A row is sent for each (token, expert) pair and comes back as one. More than this device's own pairs and
    ``how.capacity`` rows of others are never here, however uneven the loads: there are more rounds then. The first,
    which mostly is the only one, stands outside of the loop, where other work can go on beside its messages. The
    backward pass sends the rows once more.
    """
    return jnp.asarray(_in_rounds(how, x, experts, weights, matrices))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(how: How, x: Array, experts: Array, weights: Array, matrices: Matrices) -> Array:
    own, exchange, here = (
        _OwnPairs.of(experts),
        _exchange(how, experts, matrices),
        _gathered(how, matrices, x.dtype),
    )
    rows, factors = own.rows_of(x), own.factors_of(weights)

    def one(number: Array, back: Array) -> Array:
        this = exchange.round(number)
        y = _weighted(_take(how, this, rows), _take(how, this, factors), *here, this.sizes)
        return _give(how, this, y, back)

    room, rows = _beside_room(rows, len(rows))
    first = one(jnp.int32(0), room)
    return own.sums(jax.lax.fori_loop(1, exchange.rounds, one, first)).reshape(x.shape)


class _OwnPairs(NamedTuple):
    """The (token, expert) pairs of this device, by expert."""

    number: Int[Array, "M"]  # of each pair, counted token by token
    place: Int[Array, "M"]  # the inverse
    per_token: int

    @classmethod
    def of(cls, experts: Int[Array, "N K"]) -> "_OwnPairs":
        number = sort_by_expert(experts)
        return cls(number, jnp.argsort(number), experts.shape[1])

    def rows_of(self, x: Float[Array, "N D"]) -> Float[Array, "M *tiles"]:
        """Of each pair the row of its token."""
        return _in_tiles(x).at[self.number // self.per_token].get(mode="promise_in_bounds")

    def factors_of(self, weights: Float[Array, "N K"]) -> Float[Array, "M"]:
        return weights.reshape(-1)[self.number]

    def by_token(self, pairs: Array) -> Array:
        """[M, ...] as [N, K, ...]."""
        return pairs[self.place].reshape(-1, self.per_token, *pairs.shape[1:])

    def sums(self, rows: Float[Array, "M *tiles"]) -> Float[Array, "N *tiles"]:
        """Of each token the sum of its rows, taken in float32 and rounded once."""
        return jnp.sum(self.by_token(rows), axis=1)


def _exchange(how: How, experts: Array, matrices: Matrices) -> Exchange:
    everybody = matrices[0].shape[0] * jax.lax.axis_size(how.names)
    return Exchange(gather(count(experts, everybody)[None], how.names, 0), how.capacity, how.names)


def _gathered(how: How, matrices: Matrices, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Gate and up side by side [E/n, D, 2F], as one product is made with both, and down."""
    gate, up, down = (matrix.astype(dtype) for matrix in matrices)
    return whole(jnp.concatenate([gate, up], axis=2), how.up_lies), whole(down, how.down_lies)


def _in_tiles(rows: Float[Array, "M D"]) -> Float[Array, "M *tiles"]:
    """Rows as TPUs send them: each in one piece, which it is not where eight of them share tiles of memory."""
    return rows.reshape(len(rows), -1, _LANES) if rows.shape[1] % _LANES == 0 else rows[:, None]


def _beside_room(rows: Array, count: int) -> tuple[Array, Array]:
    """Undefined rows that what comes is written to, and ``rows``, which they are tied to.

    XLA would make them once, before the loop over layers, and copy them in each layer.
    """
    room = jax.lax.empty((count, *rows.shape[1:]), rows.dtype)
    return jax.lax.optimization_barrier((room, rows))


def _take(how: How, this: Round, rows: Array) -> Array:
    """The rows that a round brings, by expert; what is behind them is undefined, and nothing depends on it."""
    into, rows = _beside_room(rows, how.capacity)
    rows = send(rows, into, this.there, how.names)
    return rows if rows.ndim == 1 else rows.reshape(how.capacity, -1)


def _give(how: How, this: Round, rows: Array, back: Array) -> Array:
    """``back`` with what a round brings back of the ``rows`` that it took."""
    return send(rows if rows.ndim == 1 else _in_tiles(rows), back, this.back, how.names)


def _weighted(rows, factors, gate_up, down, sizes) -> Float[Array, "R D"]:
    """Each row through the expert of its group, times its factor."""
    return _product(_inner(_product(rows, gate_up, sizes), factors), down, sizes)


_product = functools.partial(grouped_matmul, zero_behind=False)


def _inner(gate_up: Float[Array, "R 2F"], factors: Float[Array, "R"]) -> Float[Array, "R F"]:
    a, b = (half.astype(jnp.float32) for half in jnp.split(gate_up, 2, axis=1))
    return (jax.nn.silu(a) * b * factors[:, None]).astype(gate_up.dtype)


def _weighted_backward(rows, factors, gate_up, down, sizes, d_y) -> tuple[Array, Array, list[Array]]:
    """Gradients of rows, of factors, and, in float32, of both matrices."""
    outer = functools.partial(grouped_outer_product, sizes=sizes, out_dtype=jnp.float32)
    h, backward = jax.vjp(_inner, _product(rows, gate_up, sizes), factors)
    d_gate_up, d_factors = backward(_product(d_y, down, sizes, transposed=True))
    d_rows = _product(d_gate_up, gate_up, sizes, transposed=True)
    return d_rows, d_factors, [outer(rows, d_gate_up), outer(h, d_y)]


def _forward(how, x, experts, weights, matrices):
    return _in_rounds(how, x, experts, weights, matrices), (x, experts, weights, matrices)


def _backward(how: How, residuals, d_y: Float[Array, "N D"]):
    x, experts, weights, matrices = residuals
    own, exchange, here = (
        _OwnPairs.of(experts),
        _exchange(how, experts, matrices),
        _gathered(how, matrices, x.dtype),
    )
    rows, factors, d_rows = own.rows_of(x), own.factors_of(weights), own.rows_of(d_y.astype(x.dtype))

    def one(number: Array, back: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        this = exchange.round(number)
        taken = _take(how, this, rows), _take(how, this, factors)
        *d_pairs, d_here = _weighted_backward(*taken, *here, this.sizes, _take(how, this, d_rows))
        return [_give(how, this, d, into) for d, into in zip(d_pairs, back, strict=True)], d_here

    def another(number: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        back, d_here = one(number, carry[0])
        return back, jax.tree.map(jnp.add, carry[1], d_here)

    room, rows = _beside_room(rows, len(rows))
    first = one(jnp.int32(0), [room, jax.lax.empty(factors.shape, factors.dtype)])
    (d_x, d_factors), (d_gate_up, d_down) = jax.lax.fori_loop(1, exchange.rounds, another, first)
    d_gate, d_up = jnp.split(part_of_sum(d_gate_up, how.up_lies), 2, axis=2)
    d_matrices = d_gate, d_up, part_of_sum(d_down, how.down_lies)
    d_matrices = tuple(d.astype(matrix.dtype) for d, matrix in zip(d_matrices, matrices, strict=True))
    return own.sums(d_x).reshape(x.shape), None, own.by_token(d_factors), d_matrices


_in_rounds.defvjp(_forward, _backward)
