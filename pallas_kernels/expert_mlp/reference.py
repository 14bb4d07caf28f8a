"""The contract of the chosen experts, as a loop over experts and blocks of their tokens.

A block's tokens are gathered, taken through all three products while its activations are in the cache, and added
to the output where they came from. Of all pairs only the products before SwiGLU are stored, for the backward pass.
The last block of an expert reaches over its end: what is not its own gets the weight 0 and goes to rows past the
end of the output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp.sort import count, sort_by_expert
from pallas_kernels.shapes import Array, Float, Int

_MOST_ROWS = 96  # in a block: from 64 to 256 measured alike on CPU for 256 tokens an expert


class _Pairs(NamedTuple):
    """All pairs in the order of their experts, and a block of padding after them."""

    token: Int[Array, "M+R"]
    weight: Float[Array, "M+R"]
    number: Int[Array, "M"]  # of each pair, counted row by row
    first: Int[Array, "E"]  # where each expert's begin
    size: Int[Array, "E"]


class _Block(NamedTuple):
    """Some pairs of one expert, the last perhaps not its own."""

    start: Int[Array, ""]
    x: Float[Array, "R D"]
    weight: Float[Array, "R 1"]
    token: Int[Array, "R"]
    target: Int[Array, "R"]  # the token, or a row past the end

    def added(self, total: Float[Array, "N+R D"], rows: Float[Array, "R D"]) -> Float[Array, "N+R D"]:
        """``total`` with ``rows`` added to those of the block's tokens."""
        return total.at[self.target].add(rows, mode="promise_in_bounds", unique_indices=True)

    def put(self, pairs: Float[Array, "M+R ..."], rows: Float[Array, "R ..."]) -> Float[Array, "M+R ..."]:
        """``pairs`` with ``rows`` in the block's place. Those of the next expert are put right by its own blocks."""
        return jax.lax.dynamic_update_slice_in_dim(pairs, rows.astype(pairs.dtype), self.start, 0)

    def take(self, pairs: Float[Array, "M+R F"]) -> Float[Array, "R F"]:
        """The block's rows of ``pairs``, in float32."""
        return jax.lax.dynamic_slice_in_dim(pairs, self.start, self.weight.shape[0]).astype(jnp.float32)


def _rows_per_block(pairs: int, num_experts: int) -> int:
    """Half of what an expert has on average, so that little is computed for nothing."""
    return min(_MOST_ROWS, max(8, pairs // num_experts // 2))


def _sorted_pairs(experts: Array, weights: Array, num_experts: int, rows: int) -> _Pairs:
    number = sort_by_expert(experts)
    token = jnp.pad(number // experts.shape[1], (0, rows))
    weight = jnp.pad(weights.reshape(-1)[number], (0, rows))
    size = count(experts, num_experts)
    return _Pairs(token, weight, number, jnp.cumsum(size) - size, size)


def _over_blocks(
    body: Callable[[Any, _Block], Any], carry: Any, pairs: _Pairs, expert: Array, x: Array, rows: int
) -> Any:
    """``carry = body(carry, block)`` for every block of an expert."""
    first, size = pairs.first[expert], pairs.size[expert]
    place = jnp.arange(rows, dtype=jnp.int32)

    def step(i, carry):
        start = first + i * rows
        own = start + place < first + size
        token = jax.lax.dynamic_slice_in_dim(pairs.token, start, rows)
        weight = jnp.where(own, jax.lax.dynamic_slice_in_dim(pairs.weight, start, rows), 0)
        target = jnp.where(own, token, x.shape[0] + place)
        return body(carry, _Block(start, _rows(x, token), weight[:, None], token, target))

    return jax.lax.fori_loop(0, (size + rows - 1) // rows, step, carry)


def _rows(x: Float[Array, "N D"], token: Int[Array, "R"]) -> Float[Array, "R D"]:
    return jnp.asarray(x).at[token].get(mode="promise_in_bounds")


def _product(a: Array, b: Array, contract_a: int = 1, contract_b: int = 0) -> Array:
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _forward(x, experts, weights, gate, up, down, layer=None, *, keep=True):
    """The output and what ``_backward`` needs; the products before SwiGLU are among it if ``keep``."""
    num_experts = down.shape[-3]
    rows = _rows_per_block(experts.size, num_experts)
    pairs = _sorted_pairs(experts, weights, num_experts, rows)
    active = jnp.argsort(pairs.size == 0, stable=True)  # those with tokens first

    def run_expert(i, carry):
        expert = active[i]
        place = expert if layer is None else (layer, expert)
        gate_e, up_e, down_e = (matrix[place].astype(x.dtype) for matrix in (gate, up, down))

        def run_block(carry, block: _Block):
            total, kept = carry
            products = _product(block.x, gate_e), _product(block.x, up_e)
            h = _swiglu(*products) * block.weight
            kept = [block.put(all_rows, product) for all_rows, product in zip(kept, products, strict=False)]
            return block.added(total, _product(h.astype(x.dtype), down_e)), kept

        return _over_blocks(run_block, carry, pairs, expert, x, rows)

    total = jnp.zeros((x.shape[0] + rows, x.shape[1]), jnp.float32)
    kept = [jnp.zeros((experts.size + rows, gate.shape[-1]), x.dtype)] * (2 if keep else 0)
    total, kept = jax.lax.fori_loop(0, jnp.sum(pairs.size > 0), run_expert, (total, kept))
    return total[: x.shape[0]], (x, weights, gate, up, down, pairs, kept)


def _backward(residuals, d_y):
    x, weights, gate, up, down, pairs, kept = residuals
    rows = pairs.token.shape[0] - weights.size
    d_y = d_y.astype(x.dtype)

    def run_expert(carry, expert_and_matrices):
        expert, *matrices = expert_and_matrices
        gate_e, up_e, down_e = (matrix.astype(x.dtype) for matrix in matrices)

        def run_block(carry, block: _Block):
            d_x, d_weight, d_gate, d_up, d_down = carry
            d_y_block = _rows(d_y, block.token)
            h, swiglu_backward = jax.vjp(_swiglu, *(block.take(product) for product in kept))
            d_h = _product(d_y_block, down_e, 1, 1)
            d_weight = block.put(d_weight, jnp.sum(d_h * h, axis=1))
            d_a, d_b = (d.astype(x.dtype) for d in swiglu_backward(d_h * block.weight))
            d_x = block.added(d_x, _product(d_a, gate_e, 1, 1) + _product(d_b, up_e, 1, 1))
            d_gate += _product(block.x, d_a, 0, 0)
            d_up += _product(block.x, d_b, 0, 0)
            d_down += _product((h * block.weight).astype(x.dtype), d_y_block, 0, 0)
            return d_x, d_weight, d_gate, d_up, d_down

        zeros = [jnp.zeros(matrix.shape, jnp.float32) for matrix in matrices]
        d_x, d_weight, *d_matrices = _over_blocks(run_block, (*carry, *zeros), pairs, expert, x, rows)
        return (d_x, d_weight), [d.astype(m.dtype) for d, m in zip(d_matrices, matrices, strict=True)]

    zeros = (
        jnp.zeros((x.shape[0] + rows, x.shape[1]), jnp.float32),
        jnp.zeros(pairs.weight.shape, jnp.float32),
    )
    every = jnp.arange(gate.shape[0])
    (d_x, d_weight), d_matrices = jax.lax.scan(run_expert, zeros, (every, gate, up, down))
    d_weight = d_weight[: weights.size]
    d_weight = jnp.zeros_like(d_weight).at[pairs.number].set(d_weight, unique_indices=True)
    d_weights = d_weight.reshape(weights.shape).astype(weights.dtype)
    return d_x[: x.shape[0]].astype(x.dtype), None, d_weights, *d_matrices


def expert_mlp(
    x: Float[Array, "N D"],
    experts: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    gate: Float[Array, "*L E D F"],
    up: Float[Array, "*L E D F"],
    down: Float[Array, "*L E F D"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "N D"]:
    """See ``api.expert_mlp``."""
    if layer is not None and 2 * experts.size <= down.shape[-3]:
        return _few(x, experts, weights, gate, up, down, layer)
    if layer is not None:
        return _forward(x, experts, weights, gate, up, down, layer, keep=False)[0]
    return _of_one_layer(x, experts, weights, gate, up, down)


def _few(x, experts, weights, gate, up, down, layer):
    """As when decoding: the matrices of each pair gathered, and all pairs at once."""
    gate, up, down = (matrix[layer, experts.reshape(-1)].astype(x.dtype) for matrix in (gate, up, down))
    x = jnp.repeat(x, experts.shape[1], axis=0)

    def product(a, matrices):
        return jnp.einsum("md,mdf->mf", a, matrices, preferred_element_type=jnp.float32)

    h = _swiglu(product(x, gate), product(x, up)) * weights.reshape(-1, 1)
    return jnp.sum(product(h.astype(x.dtype), down).reshape(*experts.shape, -1), axis=1)


@jax.custom_vjp
def _of_one_layer(x, experts, weights, gate, up, down):
    return _forward(x, experts, weights, gate, up, down, keep=False)[0]


_of_one_layer.defvjp(_forward, _backward)
