"""The grouped product against a loop over its groups, in float64; its cost does not grow with their number."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal, quick_jit, relative

from pallas_kernels.grouped_matmul.api import grouped_matmul

multiply = quick_jit(grouped_matmul, static_argnames="implementation")
IMPLEMENTATIONS = ["reference", "tpu"]  # the latter is ragged_dot, which runs everywhere

SIZES = {
    "even": [50, 50, 50, 50],
    "uneven, off the block size": [1, 130, 0, 7, 200, 33],
    "one group has everything": [0, 0, 300, 0],
    "empty first and last": [0, 0, 64, 65, 0],
    "one row each": [1] * 40,
    "one group": [77],
    "fewer rows than a block": [2, 0, 1],
    "256 groups, 8 rows": [1 if group in (0, 3, 100, 101, 200, 253, 254, 255) else 0 for group in range(256)],
    "256 groups, 8 rows in one": [8 if group == 255 else 0 for group in range(256)],
    "whole blocks and one row more": [128, 129, 127, 256],
}


def by_loop(lhs, rhs, sizes) -> np.ndarray:
    out, start = np.zeros((len(lhs), rhs.shape[-1])), 0
    for matrix, size in zip(rhs, sizes, strict=True):
        out[start : start + size] = lhs[start : start + size] @ matrix
        start += size
    return out


def inputs(sizes, *, past: int = 0, dtype=jnp.float32):
    """Rows of all groups, and ``past`` rows that belong to none."""
    lhs, rhs = normal(0, sum(sizes) + past, 24), normal(1, len(sizes), 24, 40)
    return jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype), jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("past", [0, 45])
@pytest.mark.parametrize("name", SIZES)
def test_product(name, past, implementation):
    lhs, rhs, sizes = inputs(SIZES[name], past=past)
    out = multiply(lhs, rhs, sizes, implementation=implementation)
    assert out.dtype == jnp.float32
    assert relative(out, by_loop(np.float64(lhs), np.float64(rhs), SIZES[name])) < 1e-6
    assert not np.any(out[sum(SIZES[name]) :])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", ["uneven, off the block size", "256 groups, 8 rows", "one group has everything"]
)
def test_gradients(name, implementation):
    """``d lhs = d out · rhsᵀ`` and ``d rhs = lhsᵀ · d out``, group by group; 0 for rows and groups without any."""
    lhs, rhs, sizes = inputs(SIZES[name], past=30)
    d_out = normal(2, len(lhs), 40)

    def total(lhs, rhs):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes, implementation=implementation) * d_out)

    d_lhs, d_rhs = quick_jit(jax.grad(total, argnums=(0, 1)))(lhs, rhs)
    expected_rhs, ends = np.zeros(rhs.shape), np.cumsum(SIZES[name])
    for group, (size, end) in enumerate(zip(SIZES[name], ends, strict=True)):
        rows = slice(end - size, end)
        expected_rhs[group] = np.float64(lhs[rows]).T @ d_out[rows]
    assert relative(d_lhs, by_loop(np.float64(d_out), np.float64(rhs).swapaxes(1, 2), SIZES[name])) < 1e-6
    assert relative(d_rhs, expected_rhs) < 1e-6
    assert not np.any(np.asarray(d_rhs)[np.array(SIZES[name]) == 0])
    assert not np.any(d_lhs[sum(SIZES[name]) :])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    """Along a long K, and in the gradient of rhs along many rows: what is left is the rounding of the result."""
    sizes = [2100, 0, 130]
    lhs, rhs = (
        jnp.asarray(normal(0, 2230, 700), jnp.bfloat16),
        jnp.asarray(normal(1, 3, 700, 8), jnp.bfloat16),
    )
    d_out = jnp.asarray(normal(2, 2230, 8), jnp.bfloat16)

    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, jnp.asarray(sizes), implementation=implementation)

    out, gradients_of = jax.vjp(product, lhs, rhs)
    d_lhs, d_rhs = gradients_of(d_out)
    assert {out.dtype, d_lhs.dtype, d_rhs.dtype} == {jnp.dtype("bfloat16")}
    lhs, rhs, d_out = (np.asarray(x, np.float64) for x in (lhs, rhs, d_out))
    expected_rhs = np.stack([lhs[:2100].T @ d_out[:2100], np.zeros((700, 8)), lhs[2100:].T @ d_out[2100:]])
    assert relative(np.asarray(out, np.float64), by_loop(lhs, rhs, sizes)) < 2e-3
    assert relative(np.asarray(d_lhs, np.float64), by_loop(d_out, rhs.swapaxes(1, 2), sizes)) < 2e-3
    assert relative(np.asarray(d_rhs, np.float64), expected_rhs) < 2e-3


def seconds(groups: int, *, gradient: bool) -> float:
    """The fastest of several runs over 4,096 rows."""
    lhs, rhs = jnp.asarray(normal(0, 4096, 256)), jnp.asarray(normal(1, groups, 256, 256))
    sizes = jnp.full(groups, 4096 // groups, jnp.int32)
    function = grouped_matmul
    if gradient:
        function = jax.grad(
            lambda lhs, rhs, sizes: jnp.sum(grouped_matmul(lhs, rhs, sizes) ** 2), argnums=(0, 1)
        )
    function = jax.jit(function)
    jax.block_until_ready(function(lhs, rhs, sizes))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(function(lhs, rhs, sizes))
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_the_cost_is_that_of_the_rows(gradient):
    """Every row by every matrix would take 8 times as long with 64 groups as with 8."""
    assert seconds(64, gradient=gradient) < 3 * seconds(8, gradient=gradient)
