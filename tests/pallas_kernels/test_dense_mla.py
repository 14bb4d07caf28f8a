"""Masked multi-head attention against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_gradients, cosine_difference, normal, quick_jit, relative
from visible import everyone, packed

from pallas_kernels.dense_mla.api import dense_mla

B, H, T, S, Q, V = 2, 3, 37, 53, 24, 16
SCALE = 0.3
EVERYONE = everyone(B, T, S)
attend = quick_jit(dense_mla, static_argnames="scale")


def inputs(dtype=jnp.float32, size: float = 1.0):
    q, k, v = size * normal(0, B, H, T, Q), normal(1, B, H, S, Q), normal(2, B, H, S, V)
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def random_mask() -> np.ndarray:
    """A row without keys and a row with one among rows with about a third."""
    mask = np.random.RandomState(3).uniform(size=(B, T, S)) < 0.3
    mask[0, 5] = False
    mask[1, 7] = np.arange(S) == 11
    return mask


def by_formula(q, k, v, mask) -> tuple[np.ndarray, np.ndarray]:
    o, lse = np.zeros((B, H, T, V)), np.full((B, H, T), -np.inf)
    for b, h, t in np.ndindex(B, H, T):
        keys = np.flatnonzero(mask[b, t])
        if keys.size:
            scores = SCALE * k[b, h, keys] @ q[b, h, t]
            highest = scores.max()
            weights = np.exp(scores - highest)
            lse[b, h, t] = np.log(weights.sum()) + highest
            o[b, h, t] = weights / weights.sum() @ v[b, h, keys]
    return o, lse


def float64(arrays) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_float32(size):
    """Also where scores reach thousands, whose exponentials no float holds."""
    arrays, mask = inputs(size=size), random_mask()
    o, lse = attend(*arrays, EVERYONE, packed(mask), scale=SCALE)
    expected_o, expected_lse = by_formula(*float64(arrays), mask)
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    # Scores of size n are right to n units in the last place, and so is what follows from them.
    assert relative(o, expected_o) < 1e-6 * max(1, size / 10)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    assert not np.any(np.asarray(o)[0, :, 5])


def test_bfloat16_output():
    """What every backend promises in bfloat16, against the formula on the same rounded inputs."""
    arrays, mask = inputs(jnp.bfloat16), random_mask()
    o, lse = attend(*arrays, EVERYONE, packed(mask), scale=SCALE)
    expected, _ = by_formula(*float64(arrays), mask)
    assert (o.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert cosine_difference(o, expected) < 7e-6


def test_bfloat16_log_sum_exp():
    """And of the log-sum-exp: products of bfloat16 numbers are exact in float32, and nothing else is rounded to less.

    The softmax scale is not a power of two, in tests as in models: a query multiplied by it must not be rounded.
    """
    arrays, mask = inputs(jnp.bfloat16), random_mask()
    _, lse = attend(*arrays, EVERYONE, packed(mask), scale=SCALE)
    _, expected = by_formula(*float64(arrays), mask)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=2e-6)


def test_gradients():
    arrays, mask = inputs(), random_mask()
    of_o, of_lse = normal(4, B, H, T, V), normal(5, B, H, T)

    def total(q, k, v):
        o, lse = dense_mla(q, k, v, EVERYONE, packed(mask), scale=SCALE)
        return jnp.sum(o * of_o) + jnp.sum(jnp.where(mask.any(-1)[:, None], lse, 0) * of_lse)

    def total_by_formula(q, k, v):
        o, lse = by_formula(q, k, v, mask)
        return np.sum(o * of_o) + np.sum(np.where(np.isfinite(lse), lse, 0) * of_lse)

    gradients = quick_jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)
    assert_gradients(gradients, total_by_formula, arrays)
    assert not np.any(np.asarray(gradients[0])[0, :, 5])


def test_gradients_where_no_query_sees_anything():
    arrays, mask = inputs(), np.zeros((B, T, S), bool)

    def total(q, k, v):
        o, lse = dense_mla(q, k, v, EVERYONE, packed(mask), scale=SCALE)
        return jnp.sum(o) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    o, lse = attend(*arrays, EVERYONE, packed(mask), scale=SCALE)
    assert not np.any(o)
    assert np.all(np.isneginf(lse))
    assert all(np.all(np.asarray(g) == 0) for g in quick_jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays))
