"""What the kernels are measured on: sizes, and arrays of them.

Numbers are normal, from a fixed key. One block of queries, as the model calls the kernels: the last ones of a sequence
without documents, which see all keys but those of the block that follow them.

Selections are those of index scores. Where *neighbours* agree, the index queries of a block are a common vector of
length √(1 - 0.1²) plus each query's own of length 0.1, and so are the head weights: two queries then share about
three quarters of their keys, and 32 of them select a little over twice as many as one. Where they are *random*, the
queries have nothing in common and share what chance lets them: the worst case for kernels that gather once for several
queries.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode import cache as paged
from pallas_kernels.decode.api import write
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk.api import select, topk_indices, topk_mask
from pallas_kernels.visibility import Visibility

_OWN = {"neighbours": 0.1, "random": 1.0}  # what a query does not share with its block
_WRITTEN = 4096  # tokens of a sequence that are put into a cache at a time


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of everything that is measured; the defaults are those of the 671B model."""

    heads: int = 128
    dense_heads: int = (
        32  # of one device: gradients of the keys of 128 heads are for more than one at this length
    )
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    index_heads: int = 64
    index_dim: int = 128
    k: int = 2048
    queries: int = 1024
    keys: int = 131072
    layers: tuple[int, ...] = (8192, 32768, 131072)  # positions at which a whole layer is measured
    decoded: int = 131072  # tokens of each sequence in the cache
    sequences: int = 16
    page: int = 64
    fp8: tuple[int, int, int] = (4096, 16384, 7168)  # rows, in, out: the projection of the heads' outputs
    grouped: tuple[int, int, int, int] = (
        16384,
        7168,
        2048,
        32,
    )  # rows, in, out, experts of one device of eight
    side: int = 8192  # of the product that is a ceiling
    copied: int = 2**30  # bytes of the copy that is one

    @property
    def width(self) -> int:
        """Of a key-value row: latent and rotary part."""
        return self.latent + self.rope

    @property
    def scale(self) -> float:
        """Of attention."""
        return (self.nope + self.rope) ** -0.5

    def piece(self) -> "Sizes":
        """The same widths, but few queries, keys and rows: where the results are compared."""
        rows, *product = self.fp8
        of_groups, inner, outer, groups = self.grouped
        return dataclasses.replace(
            self,
            k=min(self.k, 256),
            queries=min(self.queries, 64),
            keys=min(self.keys, 1024),
            layers=tuple(min(n, 1024) for n in self.layers),
            decoded=min(self.decoded, 1024),
            sequences=min(self.sequences, 4),
            fp8=(min(rows, 128), *product),
            grouped=(min(of_groups, 256), inner, outer, min(groups, 4)),
        )


SIZES = {
    "671b": Sizes(),
    "small": Sizes(
        heads=8,
        dense_heads=8,
        latent=64,
        rope=16,
        nope=32,
        value=32,
        index_heads=8,
        index_dim=32,
        k=128,
        queries=256,
        keys=4096,
        layers=(1024, 2048, 4096),
        decoded=4096,
        sequences=4,
        fp8=(256, 1024, 512),
        grouped=(512, 512, 256, 8),
        side=1024,
        copied=2**26,
    ),
}


class Indexed(NamedTuple):
    """What index scores are made of."""

    q: Float[Array, "1 T N J"]
    k: Float[Array, "1 S J"]
    w: Float[Array, "1 T N"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def normal(seed: int, shape: tuple[int, ...], dtype=jnp.bfloat16) -> Array:
    """Different for every seed."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)


def visibility_of(queries: int, keys: int) -> Visibility:
    """The last queries of one document."""
    number = jnp.arange(keys - queries, keys, dtype=jnp.int32)[None]
    return Visibility(number, jnp.ones_like(number), jnp.ones((1, keys), jnp.int32))


def indexed(sizes: Sizes, agreement: str) -> Indexed:
    """Queries of which neighbours agree, or at random."""
    own, heads = _OWN[agreement], sizes.index_heads

    def of_block(seed: int, *shape: int) -> Array:
        common = normal(seed, (1, 1, *shape), jnp.float32)
        return (1 - own**2) ** 0.5 * common + own * normal(
            seed + 1, (1, sizes.queries, *shape), dtype=jnp.float32
        )

    q, w = of_block(1, heads, sizes.index_dim), of_block(3, heads)
    return Indexed(q.astype(jnp.bfloat16), normal(5, (1, sizes.keys, sizes.index_dim)), w)


def scores_of(sizes: Sizes, agreement: str, implementation: str | None) -> Float[Array, "1 T S"]:
    """Index scores of the block."""
    run = jax.jit(index_scores, static_argnames="implementation")
    limits = visibility_of(sizes.queries, sizes.keys)
    return run(*indexed(sizes, agreement), limits, implementation=implementation)


def selection_of(
    sizes: Sizes, agreement: str, implementation: str | None
) -> Int[Array, "1 T K"] | UInt32[Array, "1 W S"]:
    """The platform's own; for a named implementation, that of the reference, in the form that it reads."""
    if implementation is None:
        return jax.jit(select, static_argnums=1)(scores_of(sizes, agreement, None), sizes.k)
    form = topk_mask if implementation == "tpu" else topk_indices
    return form(scores_of(sizes, agreement, "reference"), sizes.k, implementation="reference")


def absorbed(sizes: Sizes) -> tuple[Float[Array, "1 T H C+R"], Float[Array, "1 S C+R"]]:
    """Queries and key-value rows of sparse attention."""
    queries = normal(21, (1, sizes.queries, sizes.heads, sizes.width))
    return queries, normal(22, (1, sizes.keys, sizes.width))


def unfolded(sizes: Sizes, heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values of dense attention, heads before tokens."""
    width = sizes.nope + sizes.rope
    shapes = (sizes.queries, width), (sizes.keys, width), (sizes.keys, sizes.value)
    q, k, v = (normal(25 + i, (1, heads, *shape)) for i, shape in enumerate(shapes))
    return q, k, v


class Step(NamedTuple):
    """A filled cache, and the next token of some of its sequences."""

    cache: paged.Cache | paged.PackedCache
    table: Int[Array, "B M"]
    number: Int[Array, "B 1"]
    q: Float[Array, "B 1 H C+R"]
    index_q: Float[Array, "B 1 N J"]
    index_w: Float[Array, "B 1 N"]


def steps(sizes: Sizes, dtype: str, batch: int, implementation: str | None) -> list[Step]:
    """Of all sequences, a batch at a time: none finds its keys in a device's cache from the call before."""
    held = {"bf16": jnp.bfloat16, "e4m3": paged.E4M3}[dtype]
    cache, table = _filled(sizes, held, implementation)
    batch = min(batch, sizes.sequences)
    q = normal(11, (batch, 1, sizes.heads, sizes.width))
    index_q = normal(12, (batch, 1, sizes.index_heads, sizes.index_dim)).astype(held)
    index_w = normal(13, (batch, 1, sizes.index_heads), jnp.float32)
    number = jnp.full((batch, 1), sizes.decoded - 1, jnp.int32)
    tables = [table[first : first + batch] for first in range(0, sizes.sequences, batch)]
    return [Step(cache, table, number, q, index_q, index_w) for table in tables]


def _filled(sizes: Sizes, dtype, implementation: str | None) -> tuple[paged.Cache | paged.PackedCache, Array]:
    """All tokens of all sequences, in pages of a shuffled order; and the page table."""
    pages = sizes.decoded // sizes.page
    order = np.random.default_rng(0).permutation(sizes.sequences * pages)
    table = jnp.asarray(order.reshape(sizes.sequences, pages), jnp.int32)
    widths = {"latent_dim": sizes.latent, "rope_dim": sizes.rope, "index_dim": sizes.index_dim}
    cache = paged.empty(table.size, sizes.page, **widths, dtype=dtype, implementation=implementation)
    for first in range(0, sizes.decoded, _WRITTEN):
        cache = _fill(sizes, cache, table, first)
    return cache, table


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _fill(sizes: Sizes, cache, table: Array, first: Array):
    """The cache with some tokens of every sequence in it."""
    number = first + jnp.arange(min(_WRITTEN, sizes.decoded), dtype=jnp.int32)
    number = jnp.broadcast_to(number, (sizes.sequences, number.size))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7, impl="rbg"), first), 3)
    parts = [
        jax.random.normal(key, (*number.shape, width), jnp.bfloat16)
        for key, width in zip(keys, (sizes.latent, sizes.rope, sizes.index_dim), strict=True)
    ]
    return write(cache, table, number, *parts)


def everything(step: Step) -> Int[Array, "B 1 K"] | UInt32[Array, "B 1 S"]:
    """A selection of all tokens of every sequence, for attention to as many as there are."""
    batch, pages = step.table.shape
    keys = pages * step.cache.page_size
    if isinstance(step.cache, paged.PackedCache):
        return jnp.ones((batch, 1, keys), jnp.uint32)
    return jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, 1, keys))


def quantised(seed: int, shape: tuple[int, int], scales: tuple[int, int]) -> tuple[Array, Array]:
    """e4m3 numbers, and positive scales of their blocks."""
    return normal(seed, shape).astype(jnp.float8_e4m3fn), 0.5 + jnp.abs(normal(seed + 1, scales, jnp.float32))


def uneven(rows: int, groups: int) -> Array:
    """Rows of each group: of the busiest several times as many as of the idlest."""
    random = np.random.default_rng(0)
    return jnp.asarray(random.multinomial(rows, random.dirichlet(np.full(groups, 4.0))), jnp.int32)
