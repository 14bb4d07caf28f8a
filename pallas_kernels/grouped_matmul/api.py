"""One matrix product for each group of rows: a mixture of experts."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.grouped_matmul import gpu, reference, tpu
from pallas_kernels.platform import UnsupportedError, choose
from pallas_kernels.shapes import Array, Float, Int


def grouped_matmul(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "G K N"],
    sizes: Int[Array, "G"],
    *,
    out_dtype=None,
    zero_behind: bool = True,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """``y[m] = rows[m] · matrices[g]`` for the ``sizes[g]`` rows m of group g; groups lie one behind the other.

    Rows behind the last group may hold anything, NaN too, and give zeros, or anything where not ``zero_behind``; sizes
    must not add up to more than M (``platform.debug`` looks). The cost is that of the rows, M · K · N, however they are
    spread over the groups; ``jax.lax.ragged_dot``, whose contract this is, costs G times that on CPU and GPU, and on
    TPU in the gradient of the matrices. ``rows`` and ``matrices`` are both bfloat16 or float32, accumulation is in
    float32, rounded once to ``out_dtype``, which is that of the rows where it is None. Differentiable in both.

    Raises UnsupportedError for other dtypes, and for sizes that do not fit one another.
    """
    _check(rows, matrices, sizes)
    available = {"reference": reference, "tpu": tpu, "gpu": gpu}
    kernels = choose("grouped_matmul", implementation, available)  # type: ignore[arg-type]
    dtype = checks.result_dtype("grouped_matmul", rows.dtype if out_dtype is None else out_dtype)
    sizes = checks.sizes_within("grouped_matmul", jnp.asarray(sizes), rows.shape[0])
    return _product((kernels, dtype, zero_behind), rows, matrices, sizes)  # type: ignore[arg-type]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: tuple[ModuleType, jnp.dtype, bool], rows: Array, matrices: Array, sizes: Array) -> Array:
    kernels, out_dtype, zero_behind = how
    return kernels.product(rows, matrices, sizes, False, out_dtype, zero_behind)


def _forward(how, rows, matrices, sizes):
    return _product(how, rows, matrices, sizes), (rows, matrices, sizes)


def _backward(how, residuals, d_y):
    (kernels, _, zero_behind), (rows, matrices, sizes) = how, residuals
    d_y = d_y.astype(rows.dtype)
    d_rows = kernels.product(d_y, matrices, sizes, True, rows.dtype, zero_behind)
    return d_rows, kernels.outer_product(rows, d_y, sizes, matrices.dtype), None


_product.defvjp(_forward, _backward)


def _check(rows: Array, matrices: Array, sizes: Array) -> None:
    of_groups = {"sizes": (sizes, "G")}
    checks.shapes("grouped_matmul", {"rows": (rows, "M K"), "matrices": (matrices, "G K N")} | of_groups)
    checks.integers("grouped_matmul", of_groups)
    if rows.dtype != matrices.dtype or rows.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(
            f"grouped_matmul multiplies bfloat16 by bfloat16 or float32 by float32, not {rows.dtype} by "
            f"{matrices.dtype}: convert them first"
        )
