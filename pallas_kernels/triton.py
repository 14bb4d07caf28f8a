"""The one place, with ``relaxed_add``, that knows Pallas's Triton backend, which gathers rows as Mosaic GPU does not.

It is deprecated in jax 0.11 and compiles with jax 0.12 still; a jax without it runs everything but kernels for GPUs.
Dimensions of everything a kernel touches are powers of two, of at least 16 where it is multiplied.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.platform import UnsupportedError, gpu_interpreter
from pallas_kernels.relaxed_add import relaxed_add
from pallas_kernels.shapes import Array


def _backend():
    from jax.experimental.pallas import triton

    return triton


def call(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    warps: int,
    stages: int,
    aliases: dict[int, int] | None = None,
    cost: pl.CostEstimate,
) -> Sequence[Array]:
    """Runs ``kernel`` on whole arrays in device memory; ``stages`` is the depth of its software pipeline.

    The backend drops ``cost``; its FLOPs stand in the operation's name, for those who read compiled programs.

    Raises UnsupportedError for an array of 2³¹ elements or more, whose places Triton's integers do not hold.
    """
    for array in (*operands, *out_shape):
        if array.size >= 1 << 31:
            raise UnsupportedError(
                f"{name}: an array {array.dtype}{list(array.shape)} has 2^31 elements or more, which the GPU kernel "
                "cannot address: give it fewer queries or sequences at a time, or spread it over more devices"
            )
    # Kernels count in 32 bits, whatever the program around them does.
    with jax.named_scope(f"flops={cost.flops}"), jax.enable_x64(False):
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out_shape,
            input_output_aliases=aliases or {},
            compiler_params=_backend().CompilerParams(num_warps=warps, num_stages=stages),
            cost_estimate=cost,
            interpret=gpu_interpreter(),
            name=name,
        )(*operands)


def add_to_rows(ref, batch: Array, rows: Array, features, values: Array) -> None:
    """Adds ``values`` [K, X] to rows [K] of an array [B, S, X] in memory, atomically; rows may repeat."""
    if not gpu_interpreter():
        relaxed_add()(ref, (batch, rows, features), values)
        return
    # The interpreter has no atomic addition to rows, and blocks of threads run one after another in it: what is
    # missing is that of repeated rows every one gives their sum.
    same = (rows[:, None] == rows[None, :]).astype(values.dtype)
    ref[batch, rows, features] += dot(same, values)


def store_where(ref, row: Array, places: Array, values: Array, condition: Array, nowhere: int) -> None:
    """``ref[row, places] = values`` where the condition holds; ``nowhere`` is a place that nobody reads."""
    if not gpu_interpreter():
        _backend().store(ref.at[row, places], values, mask=condition)
    else:
        ref[row, jnp.where(condition, places, nowhere)] = values


def barrier() -> None:
    """What threads of a block wrote before it, all of them see after it."""
    if not gpu_interpreter():
        _backend().debug_barrier()


def parts(width: int) -> list[pl.Slice]:
    """A multiple of ``LEAST`` cut into powers of two, the largest first."""
    slices, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        slices.append(pl.ds(start, size))
        start += size
    return slices


def one_round(positive: Array, step: Callable[[Array], Array], start: Array) -> Array:
    """``step(start)`` in a loop of its own, whose one round the compiler cannot foresee: ``positive`` is any number.

    Triton sees no further than the loop: what it would do to a product whose result another product reads, it does
    not do to this one, and loops around it are not pipelined.
    """
    return jax.lax.fori_loop(0, jnp.minimum(positive, 1), lambda _, x: step(x), start)


def exp2(x: Array, scale: float, offset: Array) -> Array:
    """``2^(scale · x + offset)`` of float32 in two instructions, to 2 units in the last place; 0 below 2^-126.

    ``jnp.exp2`` takes four more, for results below that, and the compiler does not fuse what stands before it.
    """
    if gpu_interpreter():
        return jnp.exp2(scale * x + offset)
    return _inline(
        "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        x,
        jnp.full(x.shape, scale, x.dtype),
        offset,
    )


def fma(x: Array, factor: Array, total: Array) -> Array:
    """``x · factor + total`` of float32 in one instruction, which the compiler does not make of the two."""
    if gpu_interpreter():
        return x * factor + total
    return _inline("fma.rn.f32 $0, $1, $2, $3;", x, factor, total)


def _inline(assembly: str, x: Array, *others: Array) -> Array:
    """``assembly`` for each element: $0 from $1, that of ``x``, and $2 and $3, those of two more, all float32."""
    (result,) = _backend().elementwise_inline_asm(
        assembly,
        args=[x, *(jnp.broadcast_to(other, x.shape) for other in others)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def dot(a: Array, b: Array) -> Array:
    """A matrix product with float32 accumulation; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
