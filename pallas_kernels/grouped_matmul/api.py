"""One matrix product for each group of rows: a mixture of experts."""

import functools
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.grouped_matmul import gpu, reference, tpu
from pallas_kernels.platform import UnsupportedError, choose
from pallas_kernels.shapes import Array, Float, Int


def grouped_matmul(
    rows: Float[Array, "M K"],
    matrices: Float[Array, "G K N"] | Float[Array, "G N K"],
    sizes: Int[Array, "G"],
    *,
    transposed: bool = False,
    out_dtype=None,
    zero_behind: bool = True,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """``y[m] = rows[m] · matrices[g]`` for the ``sizes[g]`` rows m of group g; groups lie one behind the other.

    With ``transposed`` the matrices are [G, N, K], and their transposes are multiplied by.

    Rows behind the last group may hold anything, NaN too, and give zeros, or anything where not ``zero_behind``; sizes
    must not add up to more than M (``platform.debug`` looks). The cost is that of the rows, M · K · N, however they are
    spread over the groups; ``jax.lax.ragged_dot``, whose contract this is, costs G times that on CPU and GPU, and on
    TPU in the gradient of the matrices. ``rows`` and ``matrices`` are both bfloat16 or float32, accumulation is in
    float32, rounded once to ``out_dtype``, which is that of the rows where it is None. Differentiable in both.

    Raises UnsupportedError for other dtypes, and for sizes that do not fit one another.
    """
    _check("grouped_matmul", rows, {"matrices": (matrices, "G N K" if transposed else "G K N")}, sizes)
    kernels = _kernels(implementation)
    dtype = checks.result_dtype("grouped_matmul", rows.dtype if out_dtype is None else out_dtype)
    sizes = checks.sizes_within("grouped_matmul", jnp.asarray(sizes), rows.shape[0])
    return _product(_How(kernels, transposed, dtype, zero_behind), rows, matrices, sizes)


def grouped_outer_product(
    rows: Float[Array, "M K"],
    others: Float[Array, "M N"],
    sizes: Int[Array, "G"],
    *,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "G K N"]:
    """``Σ_m rows[m]ᵀ others[m]`` over the rows of each group: the gradient of ``grouped_matmul`` in its matrices.

    Of its contract, but for being differentiable.
    """
    _check("grouped_outer_product", rows, {"others": (others, "M N")}, sizes)
    dtype = checks.result_dtype("grouped_outer_product", rows.dtype if out_dtype is None else out_dtype)
    sizes = checks.sizes_within("grouped_outer_product", jnp.asarray(sizes), rows.shape[0])
    return _kernels(implementation).outer_product(rows, others, sizes, dtype)


class _How(NamedTuple):
    kernels: ModuleType
    transposed: bool
    out_dtype: jnp.dtype
    zero_behind: bool


def _kernels(implementation: str | None) -> ModuleType:
    available: Any = {"reference": reference, "tpu": tpu, "gpu": gpu}
    return cast(ModuleType, choose("grouped_matmul", implementation, available))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, rows: Array, matrices: Array, sizes: Array) -> Array:
    return how.kernels.product(rows, matrices, sizes, how.transposed, how.out_dtype, how.zero_behind)


def _forward(how, rows, matrices, sizes):
    return _product(how, rows, matrices, sizes), (rows, matrices, sizes)


def _backward(how: _How, residuals, d_y):
    rows, matrices, sizes = residuals
    d_y = d_y.astype(rows.dtype)
    d_rows = how.kernels.product(d_y, matrices, sizes, not how.transposed, rows.dtype, how.zero_behind)
    sides = (d_y, rows) if how.transposed else (rows, d_y)
    return d_rows, how.kernels.outer_product(*sides, sizes, matrices.dtype), None


_product.defvjp(_forward, _backward)


def _check(name: str, rows: Array, others: dict[str, tuple[Array, str]], sizes: Array) -> None:
    of_groups = {"sizes": (sizes, "G")}
    checks.shapes(name, {"rows": (rows, "M K")} | others | of_groups)
    checks.integers(name, of_groups)
    ((other, _),) = others.values()
    if rows.dtype != other.dtype or rows.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(
            f"{name} multiplies bfloat16 by bfloat16 or float32 by float32, not {rows.dtype} by {other.dtype}: "
            "convert them first"
        )
