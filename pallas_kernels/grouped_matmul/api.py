"""Grouped matrix multiplication."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.platform import choose


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """``out[m] = lhs[m] @ rhs[e]`` for the rows ``m`` of group ``e``; groups follow each other in ``lhs``.

    The contract of ``jax.lax.ragged_dot``: rows past the last group give 0. Products accumulate in float32 and
    are returned in the dtype of ``lhs``. Differentiable in ``lhs`` and ``rhs``. The cost is that of the rows
    there are, whatever the number of groups: on CPU ``ragged_dot`` multiplies every row by every matrix, so
    the reference goes through blocks of rows instead.
    """
    available = {
        "reference": reference.grouped_matmul,
        "tpu": jax.lax.ragged_dot,
        "gpu": jax.lax.ragged_dot,
    }
    return choose("grouped_matmul", implementation, available)(lhs, rhs, group_sizes)
