"""The FP8 product against its formula in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numerics import cosine_difference, normal, quick_jit, relative

from pallas_kernels.fp8_matmul import gpu
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.platform import UnsupportedError

run = quick_jit(fp8_matmul, static_argnames=("implementation", "transposed", "out_dtype"))
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
E4M3 = ml_dtypes.float8_e4m3fn


def exact(implementation: str) -> float:
    """Tensor cores of Hopper keep some 14 bits of a sum of 128 products; everything else, float32."""
    return 3e-4 if implementation == jax.default_backend() == "gpu" else 1e-6


def blocks(n: int) -> int:
    return -(-n // 128)


def spread(scale: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Each scale at all elements of its block."""
    return np.take(scale, np.arange(size) // 128, axis=axis)


class Case:
    """Operands quantised block by block, with scales that are no powers of two."""

    def __init__(self, rows: int, depth: int, columns: int, *, by_column: bool = False, decades: float = 0):
        self.exact = normal(0, rows, depth), normal(1, depth, columns)
        random = np.random.RandomState(2)
        # Blocks of very different size: a scale that lands at another block shows.
        x = self.exact[0] * spread(10 ** random.uniform(-decades, decades, (rows, blocks(depth))), 1, depth)
        w = self.exact[1] * spread(
            10 ** random.uniform(-decades, decades, (blocks(depth), columns)), 0, depth
        )
        self.exact = x, w
        self.x_scale = self.largest(x, 1) / 448
        self.w_scale = self.largest(w, 0) / 448
        if not by_column:
            edges = np.arange(0, columns, 128)
            self.w_scale = np.maximum.reduceat(self.w_scale, edges, axis=1)
        self.x = (x / spread(self.x_scale, 1, depth)).astype(E4M3)
        self.w = (w / self.at_weights()).astype(E4M3)

    @staticmethod
    def largest(values: np.ndarray, axis: int) -> np.ndarray:
        """Of each 128 along an axis."""
        edges = np.arange(0, values.shape[axis], 128)
        return np.maximum.reduceat(np.abs(values), edges, axis=axis).astype(np.float32)

    def at_weights(self) -> np.ndarray:
        depth, columns = self.exact[1].shape
        scale = spread(self.w_scale, 0, depth)
        return scale if scale.shape[1] == columns else spread(scale, 1, columns)

    def by_formula(self) -> np.ndarray:
        x = self.x.astype(np.float64) * spread(self.x_scale.astype(np.float64), 1, self.x.shape[1])
        return x @ (self.w.astype(np.float64) * self.at_weights())

    def run(self, implementation: str, *, transposed: bool = False, out_dtype=jnp.float32):
        w, w_scale = (self.w.T, self.w_scale.T) if transposed else (self.w, self.w_scale)
        arrays = [jnp.asarray(array) for array in (self.x, self.x_scale, w, w_scale)]
        return run(*arrays, transposed=transposed, out_dtype=out_dtype, implementation=implementation)


@pytest.mark.slow
@on_every_platform
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(300, 384, 576), (1, 576, 384), (130, 1200, 100), (7, 60, 1)],
    ids=["rows off the tile", "one row", "two tiles of rows", "less than a block"],
)
def test_product(implementation, sizes, transposed):
    """Lengths off the block everywhere: 576 is four blocks and a half."""
    case = Case(*sizes)
    y = case.run(implementation, transposed=transposed)
    assert y.dtype == jnp.float32
    assert relative(y, case.by_formula()) < exact(implementation)


@on_every_platform
def test_scales_along_the_contraction_on_both_sides(implementation):
    """As the gradient of a weight has them; 300 columns are two tiles on GPUs."""
    for case, transposed in (
        (Case(140, 300, 200, by_column=True), False),
        (Case(5, 130, 300, by_column=True), True),
    ):
        assert case.w_scale.shape == (blocks(case.x.shape[1]), case.w.shape[1])
        y = case.run(implementation, transposed=transposed)
        assert relative(y, case.by_formula()) < exact(implementation)


@pytest.mark.parametrize("columns", [1, 2, 9])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 19])
def test_bands_have_every_tile_once(rows, columns):
    place = jnp.arange(rows * columns)
    i, j = gpu._in_bands(place, rows, columns)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [
        (i, j) for i in range(rows) for j in range(columns)
    ]


@on_every_platform
def test_a_projection(implementation):
    """7168 × 2048 at a seventh of the size, rounded to bfloat16; and what quantisation costs."""
    case = Case(64, 1024, 288)
    y = case.run(implementation, out_dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert relative(y, case.by_formula()) < 5e-3
    assert cosine_difference(y, case.by_formula()) < 5e-6
    assert cosine_difference(y, case.exact[0] @ case.exact[1]) < 1e-3


@on_every_platform
def test_scales_over_eight_orders_of_magnitude(implementation):
    case = Case(40, 640, 260, decades=4)
    assert case.x_scale.max() / case.x_scale.min() > 1e6
    assert relative(case.run(implementation), case.by_formula()) < exact(implementation)


@on_every_platform
def test_reruns_are_equal_to_the_bit(implementation):
    case = Case(20, 256, 128)
    first = np.asarray(case.run(implementation))
    for _ in range(
        3 if implementation == "gpu" else 20
    ):  # threads of the GPU's interpreter take a second a run
        np.testing.assert_array_equal(case.run(implementation), first)


@on_every_platform
def test_leading_axes(implementation):
    case = Case(12, 256, 130)
    x, x_scale = case.x.reshape(3, 4, 256), case.x_scale.reshape(3, 4, 2)
    y = run(x, x_scale, case.w, case.w_scale, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(y).reshape(12, 130), case.run(implementation))


def test_what_does_not_fit_is_refused():
    case = Case(4, 256, 384)
    x, x_scale, w, w_scale = (jnp.asarray(a) for a in (case.x, case.x_scale, case.w, case.w_scale))
    with pytest.raises(UnsupportedError, match="quantise both operands"):
        fp8_matmul(x.astype(jnp.bfloat16), x_scale, w, w_scale)
    with pytest.raises(UnsupportedError, match="float32 scales"):
        fp8_matmul(x, x_scale.astype(jnp.bfloat16), w, w_scale)
    with pytest.raises(UnsupportedError, match="transposed=True"):
        fp8_matmul(x, x_scale, w.T, w_scale.T)
    with pytest.raises(UnsupportedError, match=r"x_scale is \[4, 1\] and must be \[4, 2\]"):
        fp8_matmul(x, x_scale[:, :1], w, w_scale)
    with pytest.raises(UnsupportedError, match=r"\[2, 2\] and must be \[2, 3\] or \[2, 384\]"):
        fp8_matmul(x, x_scale, w, w_scale[:, :2])
