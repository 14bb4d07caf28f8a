"""TPU programs over pairs of a block of queries and a block of keys, where most pairs may have nothing to do."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import live_blocks
from pallas_kernels.platform import tpu_interpreter
from pallas_kernels.shapes import Array, Bool
from pallas_kernels.visibility import Visibility

_VMEM_BYTES = 56 << 20
# (batch, head, block of queries, block of keys) -> block of an array
Place = Callable[[Any, Any, Any, Any], tuple]


class Operand(NamedTuple):
    """An array, or the shape of a result, and which block of it a pair reads or writes."""

    array: Array | jax.ShapeDtypeStruct
    block: tuple[int, ...]
    place: Place


class Pair(NamedTuple):
    """What a kernel knows of the pair it is called for."""

    live: Bool[Array, ""]  # some query may see some key
    first: Bool[Array, ""]  # of those that share the block that the results belong to
    last: Bool[Array, ""]
    visible: Callable[[], Bool[Array, "Q K"]]


def over_pairs(
    kernel: Callable[..., None],
    inputs: list[Operand],
    outputs: list[Operand],
    visibility: Visibility,
    tile: tuple[int, int],
    *,
    name: str,
    heads: int = 1,
    inner: Literal["key", "query", "head"] = "key",
    scratch: tuple = (),
    cost: pl.CostEstimate,
) -> list[Array]:
    """Calls ``kernel(pair, *inputs, *outputs, *scratch)`` for each batch, head and pair of blocks.

    ``tile`` is queries and keys of a block; lengths are multiples. All blocks of keys follow one another for the same
    head and queries, so that a kernel may sum over them; or all of what ``inner`` says. A pair with nothing to do is
    called too, without reading anything new.
    """
    queries, keys = tile
    batch, blocks = visibility.query_index.shape[0], visibility.query_index.shape[1] // queries
    key_blocks = visibility.key_segment.shape[1] // keys

    order = {"key": (0, 1, 2, 3), "query": (0, 1, 3, 2), "head": (0, 3, 1, 2)}[inner]
    sizes = (batch, heads, blocks, key_blocks)

    def place(*ids):
        """Batch, head, block of queries and of keys, from the place in the grid."""
        return tuple(ids[axis] for axis in order)

    def is_live(live, b, i, j):
        return live[(b * blocks + i) * key_blocks + j] != 0

    def spec(operand: Operand, redirect: bool) -> pl.BlockSpec:
        def index_map(*ids_and_live):
            *ids, live = ids_and_live
            b, h, i, j = place(*ids)
            if redirect:
                on = is_live(live, b, i, j)
                h = jnp.where(on, h, 0) if inner == "head" else h
                i = jnp.where(on, i, 0) if inner == "query" else i
                j = jnp.where(on, j, 0) if inner == "key" else j
            return operand.place(b, h, i, j)

        return pl.BlockSpec(operand.block, index_map)

    limits = [
        Operand(visibility.query_index[:, :, None], (1, queries, 1), lambda b, h, i, j: (b, i, 0)),
        Operand(visibility.query_segment[:, :, None], (1, queries, 1), lambda b, h, i, j: (b, i, 0)),
        Operand(visibility.key_segment[:, None, :], (1, 1, keys), lambda b, h, i, j: (b, 0, j)),
    ]

    def body(live, query_index, query_segment, key_segment, *refs):
        b, _, i, j = place(*(pl.program_id(axis) for axis in range(4)))
        step, steps = pl.program_id(3), pl.num_programs(3)

        def visible():
            key = j * keys + jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1)
            segment = query_segment[0]
            return (key <= query_index[0]) & (segment == key_segment[0]) & (segment != 0)

        kernel(Pair(is_live(live, b, i, j), step == 0, step == steps - 1, visible), *refs)

    operands = limits + inputs
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(sizes[order.index(axis)] for axis in range(4)),
            in_specs=[spec(operand, redirect=True) for operand in operands],
            out_specs=[spec(operand, redirect=False) for operand in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[operand.array for operand in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=cost,
        name=name,
        interpret=tpu_interpreter(),
    )(live_blocks(visibility, queries, keys).reshape(-1), *(operand.array for operand in operands))


def product(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """A matrix product with float32 accumulation; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
