"""Index scores against their formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e4m3 import VALUES
from numerics import assert_gradients, normal, quick_jit, relative
from visible import documents, everyone

from dsjax.precision.act_quant import act_quant, fake_quant
from pallas_kernels.indexer import tpu
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.platform import UnsupportedError

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


E4M3 = jnp.float8_e4m3fn


class ScaledCase(Case):
    """Operands in e4m3, and scales of the keys over several powers of two."""

    def __init__(self, *sizes: int, visibility=None):
        super().__init__(*sizes, visibility, dtype=E4M3)
        k_scale = np.exp(normal(4, *self.arrays[1].shape[:2]))
        self.arrays = [*self.arrays, self.visibility, jnp.asarray(k_scale)]

    def check_scores(self, implementation: str, tolerance: float = 1e-6) -> None:
        scores = np.asarray(scores_of(*self.arrays, implementation=implementation))
        q, k, w, k_scale = (np.asarray(self.arrays[i], np.float64) for i in (0, 1, 2, 4))
        expected = self.by_formula(q, k * k_scale[..., None], w)
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores[~self.mask], -np.inf)
        assert relative(scores[self.mask], expected[self.mask]) < tolerance


@on_every_platform
@pytest.mark.parametrize("sizes", [(300, 5, 1100, 16), (1, 3, 700, 128), (64, 8, 8192, 128)])
def test_e4m3_scores(implementation, sizes):
    ScaledCase(*sizes).check_scores(implementation)


@pytest.mark.parametrize("implementation", ["tpu"], indirect=True)
def test_e4m3_scores_of_a_matrix_unit_for_it(implementation, monkeypatch):
    monkeypatch.setattr(tpu, "tpu_multiplies", lambda dtype: dtype == E4M3)
    ScaledCase(300, 5, 1100, 16).check_scores(implementation)


@on_every_platform
def test_every_number_of_e4m3_is_kept(implementation):
    """Subnormals and both zeros too: a head for either sign, and a first feature that is the number."""
    numbers = np.concatenate([VALUES, -VALUES]).astype(np.float32)
    k = np.zeros((1, numbers.size, 32), np.float32)
    k[0, :, 0] = numbers
    q = np.zeros((1, 1, 2, 32), np.float32)
    q[0, 0, :, 0] = 1, -1
    w = np.array([[[1, -1]]], np.float32)
    operands = jnp.asarray(q, E4M3), jnp.asarray(k, E4M3), w, everyone(1, 1, numbers.size)
    scores = scores_of(*operands, implementation=implementation)
    np.testing.assert_array_equal(scores[0, 0], numbers)


@on_every_platform
def test_e4m3_is_what_the_model_computes_exactly(implementation):
    """Scales of queries in the head weights; within the rounding of float32 of the dequantised values' scores."""
    case = Case(40, 5, 300, 128)
    q, k, w = case.arrays
    (q8, q_scale), (k8, k_scale) = act_quant(q), act_quant(k)
    quantised = q8, k8, w * q_scale[..., 0], case.visibility, k_scale[..., 0]
    scores = np.asarray(scores_of(*quantised, implementation=implementation))
    model = scores_of(fake_quant(q), fake_quant(k), w, case.visibility, implementation="reference")
    assert relative(scores[case.mask], np.asarray(model)[case.mask]) < 2e-7


@on_every_platform
def test_e4m3_has_no_gradient(implementation):
    """Nor has w beside it; detached, nothing is refused."""
    case = ScaledCase(4, 3, 20, 16, visibility=everyone(2, 4, 20))
    q, k, w, visibility, k_scale = case.arrays

    def total(w, detach=lambda x: x):
        operands = q, k, detach(w), visibility, k_scale
        return jnp.sum(w) + jnp.sum(index_scores(*operands, implementation=implementation))

    with pytest.raises(UnsupportedError, match=r"index_scores: operands in float8_e4m3fn have no gradient"):
        jax.grad(total)(w)
    np.testing.assert_array_equal(jax.grad(total)(w, jax.lax.stop_gradient), np.ones(w.shape))
