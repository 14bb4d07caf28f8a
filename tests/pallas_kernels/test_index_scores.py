"""Index scores against their formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_gradients, normal, quick_jit, relative
from visible import documents, everyone

from pallas_kernels.indexer.api import index_scores

scores_of = quick_jit(index_scores, static_argnames="implementation")
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)


class Case:
    """Head weights of both signs; scores and gradients by the formula."""

    def __init__(self, queries: int, heads: int, keys: int, width: int, visibility=None, dtype=jnp.float32):
        self.visibility = visibility or documents(2, queries, keys)
        q, k = normal(0, 2, queries, heads, width), normal(1, 2, keys, width)
        self.arrays = [
            jnp.asarray(q, dtype),
            jnp.asarray(k, dtype),
            jnp.asarray(normal(2, 2, queries, heads)),
        ]
        self.mask = np.asarray(self.visibility.mask())

    def by_formula(self, q, k, w) -> np.ndarray:
        scores = np.zeros(self.mask.shape)
        for n in range(q.shape[2]):
            scores += w[..., n, None] * np.maximum(q[:, :, n] @ k.swapaxes(1, 2), 0)
        return scores

    def check_scores(self, implementation: str, tolerance: float) -> None:
        scores = np.asarray(scores_of(*self.arrays, self.visibility, implementation=implementation))
        expected = self.by_formula(*(np.asarray(x, np.float64) for x in self.arrays))
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores[~self.mask], -np.inf)
        assert relative(scores[self.mask], expected[self.mask]) < tolerance

    def gradients(self, implementation: str, cotangent: np.ndarray):
        def total(*arrays):
            scores = index_scores(*arrays, self.visibility, implementation=implementation)
            return jnp.sum(jnp.where(self.mask, scores, 0) * cotangent)

        return quick_jit(jax.grad(total, argnums=(0, 1, 2)))(*self.arrays)


@on_every_platform
@pytest.mark.parametrize("sizes", [(300, 5, 1100, 16), (1, 3, 700, 128), (40, 8, 40, 128), (2, 64, 130, 128)])
def test_scores(implementation, sizes):
    """Lengths off the tile, one query, heads of other numbers and widths."""
    Case(*sizes).check_scores(implementation, 1e-6)


@on_every_platform
def test_bfloat16_products_are_summed_in_float32(implementation):
    """Without jit, which may leave out a rounding that the program asks for."""
    case = Case(19, 5, 70, 16, dtype=jnp.bfloat16)
    scores = np.asarray(index_scores(*case.arrays, case.visibility, implementation=implementation))
    expected = case.by_formula(*(np.asarray(x, np.float64) for x in case.arrays))
    assert relative(scores[case.mask], expected[case.mask]) < 1e-6


@on_every_platform
def test_eight_thousand_keys(implementation):
    """Whole blocks that nobody sees, before a document and behind a query."""
    Case(64, 8, 8192, 128, dtype=jnp.bfloat16).check_scores(implementation, 1e-6)


@on_every_platform
def test_queries_that_see_nothing(implementation):
    nobody = everyone(2, 20, 200)._replace(query_segment=np.zeros((2, 20), np.int32))
    case = Case(20, 3, 200, 16, nobody)
    scores = scores_of(*case.arrays, nobody, implementation=implementation)
    np.testing.assert_array_equal(scores, np.full((2, 20, 200), -np.inf))
    assert all(not np.any(g) for g in case.gradients(implementation, normal(3, 2, 20, 200)))


@on_every_platform
def test_products_below_zero_count_nothing_whatever_the_sign_of_the_weight(implementation):
    case = Case(19, 5, 70, 16, everyone(2, 19, 70))
    q, k, w = case.arrays
    score = functools.partial(scores_of, implementation=implementation)
    assert not np.any(score(-jnp.abs(q), jnp.abs(k), w, case.visibility))
    assert np.all(np.asarray(score(jnp.abs(q), jnp.abs(k), -jnp.abs(w), case.visibility)) < 0)


@on_every_platform
@pytest.mark.parametrize("sizes", [(19, 5, 70, 16), (300, 9, 600, 128)])
def test_gradients(implementation, sizes):
    case = Case(*sizes)
    cotangent = normal(3, *case.mask.shape)
    weighted = cotangent * case.mask
    gradients = case.gradients(implementation, cotangent)
    assert_gradients(gradients, lambda *a: np.sum(case.by_formula(*a) * weighted), case.arrays)


@on_every_platform
def test_bfloat16_gradients(implementation):
    """Against those of float32 on the same numbers."""
    case, exact = (Case(70, 9, 600, 128, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    exact.arrays = [x.astype(jnp.float32) for x in case.arrays]
    cotangent = normal(3, *case.mask.shape)
    found, expected = case.gradients(implementation, cotangent), exact.gradients("reference", cotangent)
    for gradient, right, array in zip(found, expected, case.arrays, strict=True):
        assert gradient.dtype == array.dtype
        assert relative(gradient, right) < 1e-2
