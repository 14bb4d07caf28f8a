"""What ``compiled_kernels.py`` compiles: what a layer of the 671B model runs, at its sizes, and the kernels in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from kernel_inputs import Sizes

from pallas_kernels.decode import cache as paged
from pallas_kernels.decode.api import decode_attention
from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import select, topk_mask
from pallas_kernels.visibility import Visibility

SIZES = Sizes()  # of the 671B model, as kernels.py measures it
HOW = {"latent_dim": SIZES.latent, "scale": SIZES.scale}
BF16, F32, I32, E4M3 = jnp.bfloat16, jnp.float32, jnp.int32, jnp.float8_e4m3fn


class Program(NamedTuple):
    """A function, the shapes it is called with, and the names of its kernels by platform."""

    function: Callable[..., Any]
    arguments: tuple
    tpu: tuple[str, ...]
    gpu: tuple[str, ...]


def programs(queries: int, keys: int) -> dict[str, Callable[[], Program]]:
    """By name; call one within the mesh of the device it is for."""
    return {
        "sparse": lambda: sparse(queries, keys),
        "dense": lambda: dense(queries, keys),
        "e4m3": lambda: scores_in_e4m3(queries, keys),
        "decode": lambda: decode(keys, BF16),
        "decode8": lambda: decode(keys, E4M3),
        "fp8": fp8,
        "wgrad": fp8_of_columns,
        "experts": experts,
    }


def of(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    """One sequence of it."""
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def limits(queries: int, keys: int) -> Visibility:
    """Of one sequence."""
    return Visibility(of(I32, queries), of(I32, queries), of(I32, keys))


def indexer(queries: int, keys: int, dtype=BF16) -> tuple:
    """Index queries, keys and weights."""
    return (
        of(dtype, queries, SIZES.index_heads, SIZES.index_dim),
        of(dtype, keys, SIZES.index_dim),
        of(F32, queries, SIZES.index_heads),
    )


def sparse(queries: int, keys: int) -> Program:
    """Sparse training: scores, selection, attention, loss, and all gradients."""

    def loss(index, q, kv, limits):
        scores = index_scores(*jax.lax.stop_gradient(index), limits)
        selection = select(scores, SIZES.k)
        o, lse = sparse_mla(q, kv, selection, **HOW)
        kl = sparse_indexer_loss(*index, q, kv, lse, selection, scale=SIZES.scale)
        return jnp.sum(o.astype(F32)) + jnp.sum(kl)

    arrays = (of(BF16, queries, SIZES.heads, SIZES.width), of(BF16, keys, SIZES.width))
    tpu = ("index_scores", "topk_threshold", "topk_pack", "sparse_mla", "sparse_mla_backward", "indexer_loss")
    gpu = (
        "index_scores",
        "topk_indices",
        "sparse_mla",
        "sparse_mla_dkv",
        "sparse_mla_dq",
        "indexer_loss_target",
    )
    return Program(
        jax.grad(loss, argnums=(0, 1, 2)),
        (indexer(queries, keys), *arrays, limits(queries, keys)),
        (*tpu, "indexer_loss_backward"),
        (*gpu, "listed_index_scores", "listed_index_scores_backward"),
    )


def dense(queries: int, keys: int) -> Program:
    """Warm-up and short sequences: masked attention, loss, and all gradients."""

    def loss(index, q, k, v, limits):
        scores = index_scores(*index, limits)
        selected = topk_mask(scores, SIZES.k)
        o, lse = dense_mla(q, k, v, limits, selected, scale=SIZES.scale)
        kl = dense_indexer_loss(scores, q, k, lse, limits, selected, scale=SIZES.scale)
        return jnp.sum(o.astype(F32)) + jnp.sum(kl)

    width = SIZES.nope + SIZES.rope
    shapes = ((queries, width), (keys, width), (keys, SIZES.value))
    arrays = (of(BF16, SIZES.dense_heads, *shape) for shape in shapes)
    names = ("index_scores_dq", "index_scores_dk", "dense_mla", "dense_mla_dq", "dense_mla_dkv")
    names = (*names, "dense_indexer_loss_target")
    return Program(
        jax.grad(loss, argnums=(0, 1, 2, 3)),
        (indexer(queries, keys), *arrays, limits(queries, keys)),
        names,
        names,
    )


def scores_in_e4m3(queries: int, keys: int) -> Program:
    """Index scores as the released indexer keeps its keys."""

    def scores(index, limits, k_scale):
        return index_scores(*index, limits, k_scale)

    arguments = (indexer(queries, keys, E4M3), limits(queries, keys), of(F32, keys))
    return Program(scores, arguments, ("index_scores",), ("index_scores",))


def decode(keys: int, dtype) -> Program:
    """The next token of several sequences over their pages."""

    def next_token(cache, q, index_q, index_w, page_table, number):
        return decode_attention(q, index_q, index_w, cache, page_table, number, k=SIZES.k, **HOW)

    pages = keys // SIZES.page * 4  # most pages are shared, so that the arrays fit any device
    widths = {"latent_dim": SIZES.latent, "rope_dim": SIZES.rope, "index_dim": SIZES.index_dim}
    cache = jax.eval_shape(lambda: paged.empty(pages, SIZES.page, **widths, dtype=dtype))

    def of_each(dtype, *shape):
        return jax.ShapeDtypeStruct((SIZES.sequences, *shape), dtype)

    arguments = (
        cache,
        of_each(BF16, 1, SIZES.heads, SIZES.width),
        of_each(BF16, 1, SIZES.index_heads, SIZES.index_dim),
        of_each(F32, 1, SIZES.index_heads),
        of_each(I32, keys // SIZES.page),
        of_each(I32, 1),
    )
    names = ("paged_index_scores", "paged_sparse_mla")
    return Program(next_token, arguments, names, names)


def fp8() -> Program:
    """The projection of the heads' outputs for 4,096 tokens."""
    tokens, depth, columns = SIZES.fp8
    operands = (((tokens, depth), E4M3), ((tokens, depth // 128), F32))
    weight = (((columns, depth), E4M3), ((columns // 128, depth // 128), F32))
    arguments = tuple(jax.ShapeDtypeStruct(*x) for x in (*operands, *weight))

    def product(*operands):
        return fp8_matmul(*operands, transposed=True)

    return Program(product, arguments, ("fp8_matmul",), ("fp8_matmul",))


def fp8_of_columns() -> Program:
    """The gradient of that projection's weight: both operands quantised along the tokens."""
    tokens, depth, columns = SIZES.fp8
    operands = (((depth, tokens), E4M3), ((depth, tokens // 128), F32))
    other = (((columns, tokens), E4M3), ((columns, tokens // 128), F32))
    return fp8()._replace(arguments=tuple(jax.ShapeDtypeStruct(*x) for x in (*operands, *other)))


def experts() -> Program:
    """The up projection of a device's experts, and its gradients."""

    def total(rows, matrices, sizes):
        return jnp.sum(grouped_matmul(rows, matrices, sizes).astype(F32) ** 2)

    rows, depth, columns, groups = SIZES.grouped
    arguments = (
        jax.ShapeDtypeStruct((rows, depth), BF16),
        jax.ShapeDtypeStruct((groups, depth, columns), BF16),
        jax.ShapeDtypeStruct((groups,), I32),
    )
    return Program(
        jax.grad(total, argnums=(0, 1)),
        arguments,
        ("gmm", "tgmm"),
        ("grouped_matmul", "grouped_outer_product"),
    )
