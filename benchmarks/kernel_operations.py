"""The operations that are measured: what each computes, of how much use that is, and what we aim for.

Useful is what the formula asks for: pairs of a query and a key that it sees, or that it selected, and no others; one
pass over what has to be read. What a kernel computes in vain takes time and counts for nothing. Scores and
probabilities that a backward pass computes again count, as no one keeps them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernel_inputs as made
from kernel_inputs import Sizes

from pallas_kernels.decode.api import decode_attention, paged_sparse_mla
from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import select, topk_indices, topk_mask

E4M3, BLOCK = jnp.float8_e4m3fn, 128
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
AGREEMENTS = ("neighbours", "random")


class Work(NamedTuple):
    """The use of a call: FLOPs, or bytes where memory bounds it; rows where the time of one is what we aim for."""

    flops: float = 0
    bytes: float = 0
    rows: int = 0


class Inputs(NamedTuple):
    """Arguments of a call: those with gradients, and the others."""

    primals: Any = ()
    others: Any = ()


class Operation(NamedTuple):
    """One case of an operation: ``function(sizes, primals, others, implementation)``.

    ``phase`` is FORWARD, BACKWARD (the forward pass is not timed) or BOTH. ``inputs`` gives those of calls that are
    made in turn. Targets are by the name of a chip: a share of its peak, or microseconds a row. What ``selects`` on
    its way is compared by the middle query's error: where scores are equal to rounding, one may select another key.
    """

    name: str
    case: str
    function: Callable[[Sizes, Any, Any, str | None], Any]
    inputs: Callable[[Sizes, str | None], list[Inputs]]
    shape: Callable[[Sizes], str]
    work: Callable[[Sizes], Work]
    phase: str = FORWARD
    dtype: str = "bf16"
    targets: Mapping[str, float] = MappingProxyType({})
    selects: bool = False


def operations(sizes: Sizes) -> list[Operation]:
    """All of them, in the order of a layer."""
    rows = [*_indexer(), *_topk()]
    rows += [_sparse_mla(phase, agreement) for phase in (FORWARD, BACKWARD) for agreement in AGREEMENTS]
    rows += [_sparse_loss(agreement) for agreement in AGREEMENTS]
    rows += [_dense_mla(FORWARD), _dense_mla(BACKWARD), _dense_loss()]
    batches = sorted({sizes.sequences, 1}, reverse=True)
    rows += [_decode(batch, dtype) for batch in batches for dtype in ("bf16", "e4m3")]
    rows += [_decode_all(sizes.sequences), _fp8_matmul(), _grouped(FORWARD), _grouped(BACKWARD)]
    for number, length in enumerate(sizes.layers):
        rows += [_sparse_layer(number, length), _dense_layer(number, length)]
    return rows


def seen_pairs(queries: int, keys: int) -> int:
    """Of the last queries and all keys, those that are not later."""
    return queries * (keys - queries) + queries * (queries + 1) // 2


def selected_pairs(queries: int, keys: int, k: int) -> int:
    """Of the last queries, each with k keys or as many as it sees."""
    few = max(0, min(queries, k - (keys - queries)))  # queries that see no more than k
    return seen_pairs(few, keys - queries + few) + (queries - few) * k


def index_flops(sizes: Sizes, products: int = 1) -> int:
    """Of the pairs that the queries see."""
    return products * 2 * sizes.index_heads * sizes.index_dim * seen_pairs(sizes.queries, sizes.keys)


def sparse_flops(sizes: Sizes, phase: str) -> int:
    """Of the selected pairs. Backward: the scores again, and the gradients of probabilities, queries and rows."""
    widths = sizes.width + sizes.latent if phase == FORWARD else 3 * sizes.width + 2 * sizes.latent
    return 2 * sizes.heads * widths * selected_pairs(sizes.queries, sizes.keys, sizes.k)


def dense_flops(sizes: Sizes, heads: int, phase: str) -> int:
    """Of the pairs that the queries see."""
    key = sizes.nope + sizes.rope
    widths = key + sizes.value if phase == FORWARD else 3 * key + 2 * sizes.value
    return 2 * heads * widths * seen_pairs(sizes.queries, sizes.keys)


def _shape(sizes: Sizes, heads: int) -> str:
    return f"{sizes.queries} x {sizes.keys}, {heads} heads"


def _indexer() -> list[Operation]:
    def function(_, primals, others, implementation):
        return index_scores(*primals, *others, implementation=implementation)

    def inputs(sizes: Sizes, _):
        limits = made.visibility_of(sizes.queries, sizes.keys)
        return [Inputs(tuple(made.indexed(sizes, "random")), (limits,))]

    def in_e4m3(sizes: Sizes, _):
        q, k, w = made.indexed(sizes, "random")
        limits = made.visibility_of(sizes.queries, sizes.keys)
        k_scale = 0.5 + jnp.abs(made.normal(6, (1, sizes.keys), jnp.float32))
        return [Inputs((), (q.astype(E4M3), k.astype(E4M3), w, limits, k_scale))]

    def work(products: int):
        return lambda sizes: Work(index_flops(sizes, products))

    row = partial(Operation, "indexer", function=function, shape=lambda s: _shape(s, s.index_heads))
    peaks = {"h100": 0.45, "v5p": 0.75, "v6e": 0.42}
    return [
        row("bf16, forward", inputs=inputs, work=work(1), targets=peaks),
        row("e4m3, forward", inputs=in_e4m3, work=work(1), dtype="e4m3", targets={"h100": 0.35}),
        row("bf16, backward", inputs=inputs, work=work(3), phase=BACKWARD),
    ]


def _topk() -> list[Operation]:
    """In both forms; what we aim for is the form that the chip's attention reads."""

    def row(form: str, topk: Callable, targets: dict[str, float]) -> Operation:
        return Operation(
            "topk",
            form,
            lambda sizes, _, scores, implementation: topk(scores, sizes.k, implementation=implementation),
            lambda sizes, _: [Inputs((), made.scores_of(sizes, "neighbours", None))],
            shape=lambda sizes: f"{sizes.queries} x {sizes.keys}, k {sizes.k}",
            work=lambda sizes: Work(bytes=4 * sizes.queries * sizes.keys, rows=sizes.queries),
            targets=targets,
        )

    return [row("list", topk_indices, {"h100": 0.5}), row("mask", topk_mask, {"v5p": 3.0, "v6e": 3.0})]


def _attend(sizes: Sizes, q, kv, selection, implementation):
    how = {"latent_dim": sizes.latent, "scale": sizes.scale, "implementation": implementation}
    return sparse_mla(q, kv, selection, **how)


def _sparse_mla(phase: str, agreement: str) -> Operation:
    return Operation(
        "sparse_mla",
        f"{phase}, {agreement}",
        lambda sizes, primals, others, implementation: _attend(sizes, *primals, *others, implementation),
        lambda sizes, who: [Inputs(made.absorbed(sizes), (made.selection_of(sizes, agreement, who),))],
        shape=lambda sizes: f"{_shape(sizes, sizes.heads)}, k {sizes.k}",
        work=lambda sizes: Work(sparse_flops(sizes, phase)),
        phase=phase,
        targets={"h100": 0.40, "v5p": 0.35, "v6e": 0.25} if phase == FORWARD else {},
    )


def _sparse_loss(agreement: str) -> Operation:
    def function(sizes: Sizes, primals, others, implementation):
        return sparse_indexer_loss(*primals, *others, scale=sizes.scale, implementation=implementation)

    def inputs(sizes: Sizes, implementation):
        selection = made.selection_of(sizes, agreement, implementation)
        q, kv = made.absorbed(sizes)
        _, lse = jax.jit(_attend, static_argnums=(0, 4))(sizes, q, kv, selection, implementation)
        return [Inputs(tuple(made.indexed(sizes, agreement)), (q, kv, lse, selection))]

    def work(sizes: Sizes) -> Work:
        """Probabilities of the heads, scores of the index, and the gradients of its queries and keys."""
        products = 2 * sizes.heads * sizes.width + 3 * 2 * sizes.index_heads * sizes.index_dim
        return Work(products * selected_pairs(sizes.queries, sizes.keys, sizes.k))

    return Operation(
        "sparse_indexer_loss",
        f"{BOTH}, {agreement}",
        function,
        inputs,
        shape=lambda sizes: f"{_shape(sizes, sizes.heads)}, k {sizes.k}",
        work=work,
        phase=BOTH,
    )


def _attend_all(sizes: Sizes, q, k, v, limits, implementation):
    return dense_mla(q, k, v, limits, scale=sizes.scale, implementation=implementation)


def _dense_mla(phase: str) -> Operation:
    def inputs(sizes: Sizes, _):
        limits = made.visibility_of(sizes.queries, sizes.keys)
        return [Inputs(made.unfolded(sizes, sizes.dense_heads), (limits,))]

    return Operation(
        "dense_mla",
        phase,
        lambda sizes, primals, others, implementation: _attend_all(sizes, *primals, *others, implementation),
        inputs,
        shape=lambda sizes: _shape(sizes, sizes.dense_heads),
        work=lambda sizes: Work(dense_flops(sizes, sizes.dense_heads, phase)),
        phase=phase,
    )


def _dense_loss() -> Operation:
    def function(sizes: Sizes, primals, others, implementation):
        how = {"scale": sizes.scale, "implementation": implementation}
        return dense_indexer_loss(*primals, *others, **how)

    def inputs(sizes: Sizes, implementation):
        q, k, v = made.unfolded(sizes, sizes.dense_heads)
        limits = made.visibility_of(sizes.queries, sizes.keys)
        _, lse = jax.jit(_attend_all, static_argnums=(0, 5))(sizes, q, k, v, limits, implementation)
        return [Inputs((made.scores_of(sizes, "random", implementation),), (q, k, lse, limits))]

    def work(sizes: Sizes) -> Work:
        width = sizes.nope + sizes.rope
        return Work(2 * sizes.dense_heads * width * seen_pairs(sizes.queries, sizes.keys))

    return Operation(
        "dense_indexer_loss",
        BOTH,
        function,
        inputs,
        shape=lambda sizes: _shape(sizes, sizes.dense_heads),
        work=work,
        phase=BOTH,
    )


def _decode(batch: int, dtype: str) -> Operation:
    def function(sizes: Sizes, _, step: made.Step, implementation):
        how = {"k": sizes.k, "latent_dim": sizes.latent, "scale": sizes.scale}
        arguments = step.q, step.index_q, step.index_w, step.cache, step.table, step.number
        return decode_attention(*arguments, **how, implementation=implementation)

    def work(sizes: Sizes) -> Work:
        """All index keys, and the rows of those that were selected."""
        index = 2 * sizes.index_dim if dtype == "bf16" else sizes.index_dim + 4
        scales = 4 * -(-sizes.latent // BLOCK)
        row = 2 * sizes.width if dtype == "bf16" else sizes.latent + scales + 2 * sizes.rope
        return Work(bytes=batch * (sizes.decoded * index + sizes.k * row))

    return Operation(
        "decode",
        f"{dtype}, B = {batch}",
        function,
        lambda sizes, who: [Inputs((), step) for step in made.steps(sizes, dtype, batch, who)],
        shape=lambda sizes: f"{batch} x {sizes.decoded}, {sizes.heads} heads, k {sizes.k}",
        work=work,
        dtype=dtype,
        selects=True,
    )


def _decode_all(batch: int) -> Operation:
    """Without an index: every sequence's whole cache, by the same kernel. What sparse decoding saves."""

    def function(sizes: Sizes, _, others, implementation):
        step, selection = others
        how = {"latent_dim": sizes.latent, "scale": sizes.scale, "implementation": implementation}
        return paged_sparse_mla(step.q, step.cache, step.table, selection, **how)

    def inputs(sizes: Sizes, implementation):
        steps = made.steps(sizes, "bf16", batch, implementation)
        return [Inputs((), (step, made.everything(step))) for step in steps]

    return Operation(
        "decode",
        f"bf16, B = {batch}, all keys",
        function,
        inputs,
        shape=lambda sizes: f"{batch} x {sizes.decoded}, {sizes.heads} heads",
        work=lambda sizes: Work(bytes=batch * sizes.decoded * 2 * sizes.width),
    )


def _fp8_matmul() -> Operation:
    """With a weight as checkpoints have it, [out, in]."""

    def inputs(sizes: Sizes, _):
        rows, inner, outer = sizes.fp8
        blocks, columns = -(-inner // BLOCK), -(-outer // BLOCK)
        x, w = ((rows, inner), (rows, blocks)), ((outer, inner), (columns, blocks))
        return [Inputs((), (*made.quantised(31, *x), *made.quantised(33, *w)))]

    def function(_, primals, others, implementation):
        return fp8_matmul(*others, transposed=True, implementation=implementation)

    return Operation(
        "fp8_matmul",
        FORWARD,
        function,
        inputs,
        shape=lambda sizes: "{} x {} x {}".format(*sizes.fp8),
        work=lambda sizes: Work(2 * sizes.fp8[0] * sizes.fp8[1] * sizes.fp8[2]),
        dtype="e4m3",
        targets={"h100": 0.50, "v5p": 0.80, "v6e": 0.80},
    )


def _grouped(phase: str) -> Operation:
    def inputs(sizes: Sizes, _):
        rows, inner, outer, groups = sizes.grouped
        matrices = made.normal(42, (groups, inner, outer))
        return [Inputs((made.normal(41, (rows, inner)), matrices), (made.uneven(rows, groups),))]

    def work(sizes: Sizes) -> Work:
        rows, inner, outer, _ = sizes.grouped
        return Work((2 if phase == FORWARD else 4) * rows * inner * outer)

    return Operation(
        "grouped_matmul",
        phase,
        lambda _, primals, others, implementation: grouped_matmul(
            *primals, *others, implementation=implementation
        ),
        inputs,
        shape=lambda sizes: "{} x {} x {}, {} experts".format(*sizes.grouped),
        work=work,
        phase=phase,
    )


def _at(sizes: Sizes, number: int) -> Sizes:
    """As many keys as the layer of that number has."""
    return dataclasses.replace(sizes, keys=sizes.layers[number])


def _sparse_layer(number: int, length: int) -> Operation:
    def function(sizes: Sizes, _, others, implementation):
        index, q, kv, limits = others
        scores = index_scores(*index, limits, implementation=implementation)
        selection = select(scores, min(sizes.k, scores.shape[-1]), implementation=implementation)
        return _attend(sizes, q, kv, selection, implementation)

    def inputs(sizes: Sizes, _):
        sizes = _at(sizes, number)
        index, limits = made.indexed(sizes, "neighbours"), made.visibility_of(sizes.queries, sizes.keys)
        return [Inputs((), (index, *made.absorbed(sizes), limits))]

    return Operation(
        "layer",
        f"sparse at {length}",
        function,
        inputs,
        shape=lambda sizes: f"{_shape(_at(sizes, number), sizes.heads)}, k {sizes.k}",
        work=lambda sizes: Work(index_flops(_at(sizes, number)) + sparse_flops(_at(sizes, number), FORWARD)),
        selects=True,
    )


def _dense_layer(number: int, length: int) -> Operation:
    """All heads, some at a time: GPUs do not address the keys of 128 heads as one array at the greatest length."""

    def function(sizes: Sizes, _, others, implementation):
        groups, limits = others
        return [_attend_all(sizes, *group, limits, implementation) for group in groups]

    def inputs(sizes: Sizes, _):
        sizes = _at(sizes, number)
        limits = made.visibility_of(sizes.queries, sizes.keys)
        groups = [made.unfolded(sizes, sizes.dense_heads) for _ in range(sizes.heads // sizes.dense_heads)]
        return [Inputs((), (groups, limits))]

    return Operation(
        "layer",
        f"dense at {length}",
        function,
        inputs,
        shape=lambda sizes: _shape(_at(sizes, number), sizes.heads),
        work=lambda sizes: Work(dense_flops(_at(sizes, number), sizes.heads, FORWARD)),
    )
