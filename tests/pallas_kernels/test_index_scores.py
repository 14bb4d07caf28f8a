"""Index scores against their formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from numerics import assert_gradients, normal, quick_jit, relative

from pallas_kernels.indexer.api import index_scores

B, T, N, S, J = 2, 19, 5, 70, 16


def inputs(dtype=jnp.float32):
    """Head weights of both signs."""
    q, k = (jnp.asarray(x, dtype) for x in (normal(0, B, T, N, J), normal(1, B, S, J)))
    return [q, k, jnp.asarray(normal(2, B, T, N))]


def by_formula(q, k, w) -> np.ndarray:
    scores = np.zeros((B, T, S))
    for b, t, n in np.ndindex(B, T, N):
        scores[b, t] += w[b, t, n] * np.maximum(k[b] @ q[b, t, n], 0)
    return scores


def test_scores():
    arrays = inputs()
    scores = quick_jit(index_scores)(*arrays)
    assert scores.dtype == jnp.float32
    assert relative(scores, by_formula(*(np.asarray(x, np.float64) for x in arrays))) < 1e-6


def test_bfloat16_products_are_summed_in_float32():
    """Without jit, which may leave out a rounding that the program asks for."""
    arrays = inputs(jnp.bfloat16)
    scores = index_scores(*arrays)
    assert scores.dtype == jnp.float32
    assert relative(scores, by_formula(*(np.asarray(x, np.float64) for x in arrays))) < 1e-6


def test_products_below_zero_count_nothing_whatever_the_sign_of_the_weight():
    q, k, w = inputs()
    opposite = jnp.abs(k), -jnp.abs(q)
    assert not np.any(quick_jit(index_scores)(opposite[1], opposite[0], w))
    negative = quick_jit(index_scores)(jnp.abs(q), jnp.abs(k), -jnp.abs(w))
    assert np.all(np.asarray(negative) < 0)


def test_gradients():
    arrays, cotangent = inputs(), normal(3, B, T, S)
    gradients = quick_jit(jax.grad(lambda *a: jnp.sum(index_scores(*a) * cotangent), argnums=(0, 1, 2)))(
        *arrays
    )
    assert_gradients(gradients, lambda *a: np.sum(by_formula(*a) * cotangent), arrays)
