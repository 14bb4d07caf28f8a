"""Index scores on TPU: a tile of queries × keys stays in registers and VMEM while all heads add to it.

Forward: one tile of scores [Q, K] a step; for each head the tile of q [Q, J] meets the keys [K, J] in the MXU, and
ReLU, weight and sum follow in the VPU. Eight heads at a time: the sum is loaded and stored once for all eight.

Backward, with ``g = dI · 1[q·k > 0]``: ``dq = w · (g k)``, ``dw = q · (g k)`` (the same product: the sum over keys of
``g (q·k)`` is ``q · Σ g k``) and ``dk = Σ_n gᵀ (w q)``. The scores are computed again in each of the two kernels.
Pairs of blocks in which nobody sees anybody are skipped everywhere.

Operands in e4m3 are multiplied as they are where the matrix unit takes them (tpu7x). Elsewhere they become bfloat16,
which holds each of them exactly: queries beforehand, keys as their tile arrives in VMEM.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import LANES, pad_axis, pad_visibility, round_up
from pallas_kernels.pairs import Operand, Pair, over_pairs, product
from pallas_kernels.platform import tpu_multiplies
from pallas_kernels.shapes import Array, Float, Int
from pallas_kernels.visibility import Visibility

_HEADS = 8  # whose contributions are summed before the tile is stored
_QUERIES, _KEYS = 256, 1024  # of a forward tile
_BACKWARD_KEYS = 512


class _Padded(NamedTuple):
    """The operands as the kernels read them."""

    q: Float[Array, "B T N*J"]
    k: Float[Array, "B S J"]
    w: Float[Array, "B G T 8"]
    visibility: Visibility

    def inputs(self, tile: tuple[int, int]) -> list[Operand]:
        """Blocks of q, k and w."""
        queries, keys = tile
        return [
            Operand(self.q, (1, queries, self.q.shape[2]), lambda b, h, i, j: (b, i, 0)),
            Operand(self.k, (1, keys, self.k.shape[2]), lambda b, h, i, j: (b, j, 0)),
            self.weights(tile, self.w),
        ]

    def weights(self, tile: tuple[int, int], array) -> Operand:
        """Blocks of an array of the shape of w."""
        return Operand(array, (1, self.w.shape[1], tile[0], _HEADS), lambda b, h, i, j: (b, 0, i, 0))

    def cost(self, products: int) -> pl.CostEstimate:
        """As if everybody saw everybody."""
        pairs = self.q.shape[0] * self.q.shape[1] * self.k.shape[1]
        return pl.CostEstimate(
            flops=2 * products * pairs * self.q.shape[2], transcendentals=0, bytes_accessed=4 * pairs
        )


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    visibility: Visibility,
    k_scale: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T S"]:
    """See ``api.index_scores``."""
    if k_scale is None:
        return _scores(q, k, w, visibility)
    return _forward(q if tpu_multiplies(q.dtype) else q.astype(jnp.bfloat16), k, w, visibility, k_scale)


@jax.custom_vjp
def _scores(q: Array, k: Array, w: Array, visibility: Visibility) -> Array:
    return _forward(q, k, w, visibility)


def _forward(q: Array, k: Array, w: Array, visibility: Visibility, k_scale: Array | None = None) -> Array:
    tile = _tile(q, k, _KEYS)
    padded = _pad(q, k, w, visibility, tile)
    inputs = padded.inputs(tile)
    if k_scale is not None:
        scales = pad_axis(k_scale.astype(jnp.float32), 1, tile[1])[:, None, :]
        inputs.append(Operand(scales, (1, 1, tile[1]), lambda b, h, i, j: (b, 0, j)))
    shape = jax.ShapeDtypeStruct((q.shape[0], padded.q.shape[1], padded.k.shape[1]), jnp.float32)
    out = _scores_operand(shape, tile)
    (scores,) = over_pairs(
        _forward_kernel,
        inputs,
        [out],
        padded.visibility,
        tile,
        name="index_scores",
        cost=padded.cost(1),
    )
    return scores[:, : q.shape[1], : k.shape[1]]


def _scores_fwd(q, k, w, visibility):
    return _scores(q, k, w, visibility), (q, k, w, visibility)


def _scores_bwd(residuals, d_scores):
    q, k, w, visibility = residuals
    tile = _tile(q, k, _BACKWARD_KEYS)
    padded = _pad(q, k, w, visibility, tile)
    d_scores = _scores_operand(pad_axis(pad_axis(d_scores, 1, tile[0]), 2, tile[1]), tile)
    inputs = [*padded.inputs(tile), d_scores]

    def like(operand: Operand) -> Operand:
        return operand._replace(array=jax.ShapeDtypeStruct(operand.array.shape, jnp.float32))

    of_q, of_k, of_w = (like(operand) for operand in padded.inputs(tile))
    how = {"visibility": padded.visibility, "tile": tile, "cost": padded.cost(2)}
    d_q, d_w = over_pairs(_query_gradients_kernel, inputs, [of_q, of_w], **how, name="index_scores_dq")
    (d_k,) = over_pairs(_key_gradient_kernel, inputs, [of_k], **how, name="index_scores_dk", inner="query")
    d_q = d_q.reshape(*d_q.shape[:2], -1, padded.k.shape[-1])[:, : q.shape[1], : q.shape[2], : q.shape[3]]
    d_w = d_w.swapaxes(1, 2).reshape(*d_q.shape[:1], d_w.shape[2], -1)[:, : w.shape[1], : w.shape[2]]
    d_k = d_k[:, : k.shape[1], : k.shape[2]]
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_w.astype(w.dtype), None


_scores.defvjp(_scores_fwd, _scores_bwd)


def _tile(q: Array, k: Array, most_keys: int) -> tuple[int, int]:
    rows = max(16, 32 // q.dtype.itemsize)  # of a register
    return min(_QUERIES, round_up(q.shape[1], rows)), min(most_keys, round_up(k.shape[1], LANES))


def _scores_operand(array, tile: tuple[int, int]) -> Operand:
    return Operand(array, (1, *tile), lambda b, h, i, j: (b, i, j))


def _pad(q: Array, k: Array, w: Array, visibility: Visibility, tile: tuple[int, int]) -> _Padded:
    """Whole tiles, whole groups of heads, and heads as wide as a row of lanes: what is added is zero."""
    queries, keys = tile
    q = pad_axis(pad_axis(pad_axis(q, 3, LANES), 2, _HEADS), 1, queries)
    w = pad_axis(pad_axis(w.astype(jnp.float32), 2, _HEADS), 1, queries)
    w = w.reshape(*w.shape[:2], -1, _HEADS).swapaxes(1, 2)
    k = pad_axis(pad_axis(k, 2, LANES), 1, keys)
    return _Padded(q.reshape(*q.shape[:2], -1), k, w, pad_visibility(visibility, queries, keys))


def _lanes_of(head: Int[Array, ""], width: int):
    return pl.ds(pl.multiple_of(head * width, width), width)


def _forward_kernel(pair: Pair, q, k, w, *scale_and_out):
    """One tile of scores; ``k_scale`` comes with keys in e4m3 alone."""
    *scale, out = scale_and_out
    width = k.shape[2]

    @pl.when(pair.live)
    def _():
        keys = k[0].astype(q.dtype)

        def group(g, _):
            total = out[0]
            for n in range(_HEADS):
                products = product(q[0, :, _lanes_of(g * _HEADS + n, width)], keys, 1, 1)
                total += jnp.maximum(products, 0) * w[0, g][:, n : n + 1]
            out[0] = total
            return 0

        out[0] = jnp.zeros(out.shape[1:], jnp.float32)
        jax.lax.fori_loop(0, w.shape[1], group, 0)
        total = out[0]
        for of_keys in scale:
            total *= of_keys[0]
        out[0] = jnp.where(pair.visible(), total, -jnp.inf)

    @pl.when(jnp.logical_not(pair.live))
    def _():
        out[0] = jnp.full(out.shape[1:], -jnp.inf, jnp.float32)


def _query_gradients_kernel(pair: Pair, q, k, w, d_out, d_q, d_w):
    """``g k`` summed over the blocks of keys; at the last, both gradients from it."""
    width = k.shape[2]

    @pl.when(pair.first)
    def _():
        d_q[...] = jnp.zeros_like(d_q)

    @pl.when(pair.live)
    def _():
        keys = k[0]
        d_scores = jnp.where(pair.visible(), d_out[0], 0)

        def head(n, _):
            lanes = _lanes_of(n, width)
            passed = jnp.where(product(q[0, :, lanes], keys, 1, 1) > 0, d_scores, 0)
            d_q[0, :, lanes] += product(passed.astype(keys.dtype), keys, 1, 0)
            return 0

        jax.lax.fori_loop(0, q.shape[2] // width, head, 0)

    @pl.when(pair.last)
    def _():
        def group(g, _):
            d_weights = []
            for n in range(_HEADS):
                lanes = _lanes_of(g * _HEADS + n, width)
                summed = d_q[0, :, lanes]
                d_weights.append(jnp.sum(q[0, :, lanes].astype(jnp.float32) * summed, axis=1, keepdims=True))
                d_q[0, :, lanes] = summed * w[0, g][:, n : n + 1]
            d_w[0, g] = jnp.concatenate(d_weights, axis=1)
            return 0

        jax.lax.fori_loop(0, w.shape[1], group, 0)


def _key_gradient_kernel(pair: Pair, q, k, w, d_out, d_k):
    """``Σ_n gᵀ (w q)`` summed over the blocks of queries."""
    width = k.shape[2]

    @pl.when(pair.first)
    def _():
        d_k[...] = jnp.zeros_like(d_k)

    @pl.when(pair.live)
    def _():
        keys = k[0]
        d_scores = jnp.where(pair.visible(), d_out[0], 0)

        def group(g, _):
            total = d_k[0]
            for n in range(_HEADS):
                q_n = q[0, :, _lanes_of(g * _HEADS + n, width)]
                passed = jnp.where(product(q_n, keys, 1, 1) > 0, d_scores, 0)
                weighted = (q_n.astype(jnp.float32) * w[0, g][:, n : n + 1]).astype(keys.dtype)
                total += product(passed.astype(keys.dtype), weighted, 0, 0)
            d_k[0] = total
            return 0

        jax.lax.fori_loop(0, w.shape[1], group, 0)
