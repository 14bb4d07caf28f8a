"""Index scores on TPU: a tile of queries × keys stays in registers and VMEM while all heads add to it.

Forward: one tile of scores [Q, K] a step; for each head the tile of q [Q, J] meets the keys [K, J] in the MXU, and
ReLU, weight and sum follow in the VPU. Eight heads at a time: the sum is loaded and stored once for all eight.

Backward, with ``g = dI · 1[q·k > 0]``: ``dq = w · (g k)``, ``dw = q · (g k)`` (the same product: the sum over keys of
``g (q·k)`` is ``q · Σ g k``) and ``dk = Σ_n gᵀ (w q)``. The scores are computed again in each of the two kernels.
Pairs of blocks in which nobody sees anybody are skipped everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import live_blocks, pad_axis, pad_visibility, round_up
from pallas_kernels.platform import tpu_interpreter
from pallas_kernels.visibility import Visibility

_LANES = 128
_HEADS = 8  # whose contributions are summed before the tile is stored
_VMEM_BYTES = 48 << 20
_QUERIES, _KEYS = 256, 1024  # of a forward tile
_BACKWARD_KEYS = 512


class _Padded(NamedTuple):
    """The operands as the kernels read them."""

    q: Float[Array, "B T N*J"]
    k: Float[Array, "B S J"]
    w: Float[Array, "B G T 8"]
    visibility: Visibility

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, queries, keys, heads."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2] // self.k.shape[2]


def index_scores(
    q: Float[Array, "B T N J"], k: Float[Array, "B S J"], w: Float[Array, "B T N"], visibility: Visibility
) -> Float[Array, "B T S"]:
    """See ``api.index_scores``."""
    return _scores(q, k, w, visibility)


@jax.custom_vjp
def _scores(q: Array, k: Array, w: Array, visibility: Visibility) -> Array:
    queries, keys = _tile(q, k, _KEYS)
    padded = _pad(q, k, w, visibility, queries, keys)
    batch, t, s, _ = padded.sizes
    out = pl.BlockSpec((1, queries, keys), lambda b, i, j, live: (b, i, j))
    call = _call(
        _forward_kernel, padded, queries, keys, out, jax.ShapeDtypeStruct((batch, t, s), jnp.float32)
    )
    return call[:, : q.shape[1], : k.shape[1]]


def _scores_fwd(q, k, w, visibility):
    return _scores(q, k, w, visibility), (q, k, w, visibility)


def _scores_bwd(residuals, d_scores):
    q, k, w, visibility = residuals
    queries, keys = _tile(q, k, _BACKWARD_KEYS)
    padded = _pad(q, k, w, visibility, queries, keys)
    d_scores = pad_axis(pad_axis(d_scores, 1, queries), 2, keys)
    d_q, d_w = _query_gradients(padded, d_scores, queries, keys)
    d_k = _key_gradient(padded, d_scores, queries, keys)
    d_q = d_q.reshape(*d_q.shape[:2], -1, padded.k.shape[-1])[:, : q.shape[1], : q.shape[2], : q.shape[3]]
    d_w = d_w.swapaxes(1, 2).reshape(*d_w.shape[:1], d_w.shape[2], -1)[:, : w.shape[1], : w.shape[2]]
    d_k = d_k[:, : k.shape[1], : k.shape[2]]
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_w.astype(w.dtype), None


_scores.defvjp(_scores_fwd, _scores_bwd)


def _tile(q: Array, k: Array, most_keys: int) -> tuple[int, int]:
    return min(_QUERIES, round_up(q.shape[1], 16)), min(most_keys, round_up(k.shape[1], _LANES))


def _pad(q: Array, k: Array, w: Array, visibility: Visibility, queries: int, keys: int) -> _Padded:
    """Whole tiles, whole groups of heads, and heads as wide as a row of lanes: what is added is zero."""
    q = pad_axis(pad_axis(pad_axis(q, 3, _LANES), 2, _HEADS), 1, queries)
    w = pad_axis(pad_axis(w.astype(jnp.float32), 2, _HEADS), 1, queries)
    w = w.reshape(*w.shape[:2], -1, _HEADS).swapaxes(1, 2)
    return _Padded(
        q.reshape(*q.shape[:2], -1),
        pad_axis(pad_axis(k, 2, _LANES), 1, keys),
        w,
        pad_visibility(visibility, queries, keys),
    )


def _call(
    kernel, padded: _Padded, queries: int, keys: int, out_specs, out_shape, d_scores=None, *, by_key=False
):
    """``kernel`` over all pairs of a block of queries and one of keys; those of one query follow one another.

    With ``by_key`` those of one key do.
    """
    batch, t, s, heads = padded.sizes
    width = padded.k.shape[2]
    grid = (batch, t // queries, s // keys)
    place = (lambda b, x, y: (b, y, x)) if by_key else (lambda b, x, y: (b, x, y))
    if by_key:
        grid = (grid[0], grid[2], grid[1])
    live = live_blocks(padded.visibility, queries, keys)
    blocks = live.shape[1:]

    def is_live(live, b, i, j):
        return live[(b * blocks[0] + i) * blocks[1] + j]

    def at(block_of):
        """An index map from one over (b, i, j), in which a pair with nothing to do reads what is already there."""

        def index_map(b, x, y, live):
            b, i, j = place(b, x, y)
            on = is_live(live, b, i, j) != 0
            i, j = (jnp.where(on, i, 0), j) if by_key else (i, jnp.where(on, j, 0))
            return block_of(b, i, j)

        return index_map

    visibility = padded.visibility
    specs = [
        pl.BlockSpec((1, queries, heads * width), at(lambda b, i, j: (b, i, 0))),
        pl.BlockSpec((1, keys, width), at(lambda b, i, j: (b, j, 0))),
        pl.BlockSpec((1, heads // _HEADS, queries, _HEADS), at(lambda b, i, j: (b, 0, i, 0))),
        pl.BlockSpec((1, queries, 1), at(lambda b, i, j: (b, i, 0))),
        pl.BlockSpec((1, queries, 1), at(lambda b, i, j: (b, i, 0))),
        pl.BlockSpec((1, 1, keys), at(lambda b, i, j: (b, 0, j))),
    ]
    operands = [
        padded.q,
        padded.k,
        padded.w,
        visibility.query_index[:, :, None],
        visibility.query_segment[:, :, None],
        visibility.key_segment[:, None, :],
    ]
    if d_scores is not None:
        specs.append(pl.BlockSpec((1, queries, keys), at(lambda b, i, j: (b, i, j))))
        operands.append(d_scores)

    def with_liveness(live, *refs):
        b, i, j = place(*(pl.program_id(axis) for axis in range(3)))
        kernel(is_live(live, b, i, j) != 0, j * keys, *refs)

    return pl.pallas_call(
        with_liveness,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_specs
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=tpu_interpreter(),
    )(live.reshape(-1), *operands)


def _product(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """A matrix product with float32 accumulation; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _lanes_of(head: Int[Array, ""], width: int):
    return pl.ds(pl.multiple_of(head * width, width), width)


def _visible(first_key, query_index, query_segment, key_segment):
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, key_segment.shape[-1]), 1)
    segment = query_segment[0]
    return (key <= query_index[0]) & (segment == key_segment[0]) & (segment != 0)


def _forward_kernel(live, first_key, q, k, w, query_index, query_segment, key_segment, out):
    """One tile of scores."""
    width = k.shape[2]

    @pl.when(live)
    def _():
        keys = k[0]

        def group(g, _):
            total = out[0]
            for n in range(_HEADS):
                products = _product(q[0, :, _lanes_of(g * _HEADS + n, width)], keys, 1, 1)
                total += jnp.maximum(products, 0) * w[0, g][:, n : n + 1]
            out[0] = total
            return 0

        out[0] = jnp.zeros(out.shape[1:], jnp.float32)
        jax.lax.fori_loop(0, w.shape[1], group, 0)
        visible = _visible(first_key, query_index, query_segment, key_segment)
        out[0] = jnp.where(visible, out[0], -jnp.inf)

    @pl.when(jnp.logical_not(live))
    def _():
        out[0] = jnp.full(out.shape[1:], -jnp.inf, jnp.float32)


def _query_gradients(padded: _Padded, d_scores: Array, queries: int, keys: int) -> tuple[Array, Array]:
    """dq, and dw in the padded shape of w."""
    specs = [
        pl.BlockSpec((1, queries, padded.q.shape[2]), lambda b, i, j, live: (b, i, 0)),
        pl.BlockSpec((1, padded.w.shape[1], queries, _HEADS), lambda b, i, j, live: (b, 0, i, 0)),
    ]
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (padded.q, padded.w)]
    return _call(_query_gradients_kernel, padded, queries, keys, specs, shapes, d_scores)


def _query_gradients_kernel(
    live, first_key, q, k, w, query_index, query_segment, key_segment, d_out, d_q, d_w
):
    """``g k`` summed over the blocks of keys; at the last, both gradients from it."""
    width, block = k.shape[2], pl.program_id(2)

    @pl.when(block == 0)
    def _():
        d_q[...] = jnp.zeros_like(d_q)

    @pl.when(live)
    def _():
        keys = k[0]
        visible = _visible(first_key, query_index, query_segment, key_segment)
        d_scores = jnp.where(visible, d_out[0], 0)

        def head(n, _):
            lanes = _lanes_of(n, width)
            passed = jnp.where(_product(q[0, :, lanes], keys, 1, 1) > 0, d_scores, 0)
            d_q[0, :, lanes] += _product(passed.astype(keys.dtype), keys, 1, 0)
            return 0

        jax.lax.fori_loop(0, q.shape[2] // width, head, 0)

    @pl.when(block == pl.num_programs(2) - 1)
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


def _key_gradient(padded: _Padded, d_scores: Array, queries: int, keys: int) -> Array:
    spec = pl.BlockSpec((1, keys, padded.k.shape[2]), lambda b, j, i, live: (b, j, 0))
    shape = jax.ShapeDtypeStruct(padded.k.shape, jnp.float32)
    return _call(_key_gradient_kernel, padded, queries, keys, spec, shape, d_scores, by_key=True)


def _key_gradient_kernel(live, first_key, q, k, w, query_index, query_segment, key_segment, d_out, d_k):
    """``Σ_n gᵀ (w q)`` summed over the blocks of queries."""
    width = k.shape[2]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_k[...] = jnp.zeros_like(d_k)

    @pl.when(live)
    def _():
        keys = k[0]
        visible = _visible(first_key, query_index, query_segment, key_segment)
        d_scores = jnp.where(visible, d_out[0], 0)

        def group(g, _):
            total = d_k[0]
            for n in range(_HEADS):
                q_n = q[0, :, _lanes_of(g * _HEADS + n, width)]
                passed = jnp.where(_product(q_n, keys, 1, 1) > 0, d_scores, 0)
                weighted = (q_n.astype(jnp.float32) * w[0, g][:, n : n + 1]).astype(keys.dtype)
                total += _product(passed.astype(keys.dtype), weighted, 0, 0)
            d_k[0] = total
            return 0

        jax.lax.fori_loop(0, w.shape[1], group, 0)
