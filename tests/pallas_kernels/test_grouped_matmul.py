"""Grouped products against a loop over groups in float64."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal, quick_jit, relative

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_outer_product
from pallas_kernels.platform import UnsupportedError

run = quick_jit(grouped_matmul, static_argnames=("implementation", "out_dtype", "zero_behind"))
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
SIZES = {
    "off the tile": [37, 150, 3, 110],
    "empty groups and rows behind the last": [0, 70, 0, 0, 33, 0],
    "one group has every row": [0, 200, 0],
    "no rows": [0, 0],
    "one row": [0, 0, 1, 0],
    "a row each": [1] * 20,
}


class Case:
    """Behind the groups lie seven rows of nobody, of which nothing must be read, except where one group has all."""

    def __init__(self, name: str, depth: int = 40, columns: int = 24, dtype=jnp.float32):
        self.sizes = np.array(SIZES[name], np.int32)
        count = int(self.sizes.sum()) + (0 if name == "one group has every row" else 7)
        self.rows = jnp.asarray(normal(0, count, depth), dtype)
        self.matrices = jnp.asarray(normal(1, len(self.sizes), depth, columns), dtype)
        self.d_y = jnp.asarray(normal(2, count, columns), dtype)
        nobody = (jnp.arange(count) >= int(self.sizes.sum()))[:, None]
        self.rows, self.d_y = (jnp.where(nobody, jnp.nan, array) for array in (self.rows, self.d_y))

    def by_formula(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The product and both gradients."""
        rows, matrices, d_y = (np.asarray(a, np.float64) for a in (self.rows, self.matrices, self.d_y))
        y, d_rows, d_matrices = np.zeros(d_y.shape), np.zeros(rows.shape), np.zeros(matrices.shape)
        ends = np.cumsum(self.sizes)
        for group, (first, end) in enumerate(zip(ends - self.sizes, ends, strict=True)):
            own = slice(first, end)
            y[own] = rows[own] @ matrices[group]
            d_rows[own] = d_y[own] @ matrices[group].T
            d_matrices[group] = rows[own].T @ d_y[own]
        return y, d_rows, d_matrices

    def run(self, implementation: str, *, transposed: bool = False):
        def product(rows, matrices):
            if transposed:
                matrices = matrices.swapaxes(1, 2)
            return grouped_matmul(
                rows, matrices, self.sizes, transposed=transposed, implementation=implementation
            )

        def both(rows, matrices, d_y):
            y, backward = jax.vjp(product, rows, matrices)
            return y, *backward(d_y)

        return quick_jit(both)(self.rows, self.matrices, self.d_y)


def assert_close(found: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    """Zeros are exact, so that nobody's rows and empty groups are."""
    found = np.asarray(found, np.float64)
    np.testing.assert_array_equal(found[expected == 0], 0)
    if expected.any():
        assert relative(found, expected) < tolerance


@on_every_platform
@pytest.mark.parametrize("name", SIZES)
def test_product_and_gradients(name, implementation):
    case = Case(name)
    for found, expected in zip(case.run(implementation), case.by_formula(), strict=True):
        assert found.dtype == jnp.float32
        assert_close(found, expected, 1e-6)


@on_every_platform
def test_transposed_matrices(implementation):
    case = Case("off the tile")
    for found, expected in zip(case.run(implementation, transposed=True), case.by_formula(), strict=True):
        assert_close(found, expected, 1e-6)


@on_every_platform
def test_outer_products_of_bfloat16_in_float32(implementation):
    case = Case("empty groups and rows behind the last", dtype=jnp.bfloat16)
    found = quick_jit(
        lambda *arguments: grouped_outer_product(
            *arguments, out_dtype=jnp.float32, implementation=implementation
        )
    )(case.rows, case.d_y, case.sizes)
    assert found.dtype == jnp.float32
    assert_close(found, case.by_formula()[2], 1e-6)


@on_every_platform
def test_what_is_behind_may_be_anything(implementation):
    """The rows of the groups are those of a call that wants zeros behind them."""
    case = Case("empty groups and rows behind the last")
    options = {"implementation": implementation}
    wanted = run(case.rows, case.matrices, case.sizes, **options)
    found = run(case.rows, case.matrices, case.sizes, zero_behind=False, **options)
    np.testing.assert_array_equal(found[: case.sizes.sum()], wanted[: case.sizes.sum()])


@on_every_platform
def test_several_tiles_in_bfloat16(implementation):
    """Widths of more than a tile and off it."""
    case = Case("off the tile", 1100, 200, jnp.bfloat16)
    for found, expected in zip(case.run(implementation), case.by_formula(), strict=True):
        assert found.dtype == jnp.bfloat16
        assert_close(found, expected, 5e-3)


@on_every_platform
def test_bfloat16_products_are_summed_and_returned_in_float32(implementation):
    case = Case("off the tile", 200, 24, jnp.bfloat16)
    y = run(case.rows, case.matrices, case.sizes, out_dtype=jnp.float32, implementation=implementation)
    assert y.dtype == jnp.float32
    assert_close(y, case.by_formula()[0], 1e-6)


def test_what_does_not_fit_is_refused():
    case = Case("off the tile")
    with pytest.raises(UnsupportedError, match="not float32 by bfloat16"):
        grouped_matmul(case.rows, case.matrices.astype(jnp.bfloat16), case.sizes)
    with pytest.raises(UnsupportedError, match=r"sizes is int32\[2\].*G = 4 as in matrices"):
        grouped_matmul(case.rows, case.matrices, case.sizes[:2])
    with pytest.raises(UnsupportedError, match=r"grouped_outer_product: others is float32\[300, 24\]"):
        grouped_outer_product(case.rows, case.d_y[:300], case.sizes)


def seconds(groups: int, *, gradient: bool) -> float:
    """The fastest of several runs over 4,096 rows."""
    rows, matrices = jnp.asarray(normal(0, 4096, 128)), jnp.asarray(normal(1, groups, 128, 128))
    sizes = jnp.full(groups, 4096 // groups, jnp.int32)

    def loss(rows, matrices):
        return jnp.sum(grouped_matmul(rows, matrices, sizes) ** 2)

    function = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else loss)
    jax.block_until_ready(function(rows, matrices))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(function(rows, matrices))
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_the_cost_is_that_of_the_rows(gradient):
    """Every row by every matrix would take 8 times as long with 64 groups as with 8."""
    assert seconds(64, gradient=gradient) < 3 * seconds(8, gradient=gradient)
