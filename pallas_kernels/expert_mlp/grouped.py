"""The chosen experts as three grouped products over pairs sorted by expert."""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp.sort import count, sort_by_expert
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.shapes import Array, Float, Int


def expert_mlp(
    x: Float[Array, "N D"],
    experts: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    gate: Float[Array, "*L E D F"],
    up: Float[Array, "*L E D F"],
    down: Float[Array, "*L E F D"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "N D"]:
    """See ``api.expert_mlp``. The inner activations of all pairs exist at once."""
    if layer is not None:
        gate, up, down = (matrix[layer] for matrix in (gate, up, down))
    gate, up, down = (matrix.astype(x.dtype) for matrix in (gate, up, down))
    sizes, order = count(experts, gate.shape[0]), sort_by_expert(experts)
    place = jnp.argsort(order)  # where each pair went
    rows = _dispatch(x, order, place)
    a, b = (grouped_matmul(rows, matrix, sizes).astype(jnp.float32) for matrix in (gate, up))
    y = grouped_matmul((jax.nn.silu(a) * b).astype(x.dtype), down, sizes)
    y = _permute(y, place, order).reshape(*experts.shape, -1)
    return jnp.einsum("nk,nkd->nd", weights, y.astype(jnp.float32))


@jax.custom_vjp
def _permute(rows: Array, order: Array, inverse: Array) -> Array:
    """``rows[order]`` for a permutation; its gradient is a gather too, where XLA would scatter."""
    return rows.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permute_fwd(rows, order, inverse):
    return _permute(rows, order, inverse), (order, inverse)


def _permute_bwd(residuals, d_rows):
    order, inverse = residuals
    return _permute(d_rows, inverse, order), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def _dispatch(x: Array, order: Array, place: Array) -> Array:
    """The row of its token for every (token, expert) pair, in the order of the experts."""
    per_token = order.shape[0] // x.shape[0]
    return x.at[order // per_token].get(mode="promise_in_bounds")


def _dispatch_fwd(x, order, place):
    return _dispatch(x, order, place), (order, place, x.shape[0])


def _dispatch_bwd(residuals, d_rows):
    order, place, tokens = residuals
    by_token = _permute(d_rows, place, order).reshape(tokens, -1, d_rows.shape[-1])
    return jnp.sum(by_token.astype(jnp.float32), axis=1).astype(d_rows.dtype), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)
