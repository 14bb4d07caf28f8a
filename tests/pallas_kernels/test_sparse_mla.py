"""Attention to listed keys against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_gradients, cosine_difference, normal, quick_jit, relative

from pallas_kernels.sparse_mla.api import sparse_mla

B, T, H, S, C, R, K = 2, 37, 3, 90, 24, 8, 20
SCALE = 0.2
attend = quick_jit(sparse_mla, static_argnames=("latent_dim", "scale"))


def inputs(dtype=jnp.float32, size: float = 1.0):
    return [jnp.asarray(x, dtype) for x in (size * normal(0, B, T, H, C + R), normal(1, B, S, C + R))]


def random_indices() -> np.ndarray:
    """Distinct keys in no order, -1 anywhere among them; a row of -1 alone, one with a single key, and key 0."""
    random = np.random.RandomState(2)
    indices = np.stack([random.permutation(S)[:K] for _ in range(B * T)]).reshape(B, T, K)
    indices[random.uniform(size=indices.shape) < 0.2] = -1
    indices[0, 5] = -1
    indices[1, 7] = np.where(np.arange(K) == 3, 11, -1)
    indices[1, 8] = np.where(np.arange(K) == 3, 0, -1)
    return indices.astype(np.int32)


def by_formula(q, kv, indices) -> tuple[np.ndarray, np.ndarray]:
    o, lse = np.zeros((B, T, H, C)), np.full((B, T, H), -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        rows = kv[b, indices[b, t][indices[b, t] >= 0]]
        if len(rows):
            scores = SCALE * rows @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            lse[b, t, h] = np.log(weights.sum()) + scores.max()
            o[b, t, h] = weights / weights.sum() @ rows[:, :C]
    return o, lse


def float64(arrays) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_float32(size):
    arrays, indices = inputs(size=size), random_indices()
    o, lse = attend(*arrays, indices, latent_dim=C, scale=SCALE)
    expected_o, expected_lse = by_formula(*float64(arrays), indices)
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    assert relative(o, expected_o) < 1e-6 * max(1, size / 10)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    assert not np.any(np.asarray(o)[0, 5])


def test_bfloat16_output():
    """What every backend promises in bfloat16, against the formula on the same rounded inputs."""
    arrays, indices = inputs(jnp.bfloat16), random_indices()
    o, lse = attend(*arrays, indices, latent_dim=C, scale=SCALE)
    expected, _ = by_formula(*float64(arrays), indices)
    assert (o.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert cosine_difference(o, expected) < 7e-6


def test_bfloat16_log_sum_exp():
    """And of the log-sum-exp: products of bfloat16 numbers are exact in float32, and nothing else is rounded to less.

    The softmax scale is not a power of two, in tests as in models: a query multiplied by it must not be rounded.
    """
    arrays, indices = inputs(jnp.bfloat16), random_indices()
    _, lse = attend(*arrays, indices, latent_dim=C, scale=SCALE)
    _, expected = by_formula(*float64(arrays), indices)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=2e-6)


def test_more_places_than_keys():
    """A list longer than there are keys: every key once, -1 behind."""
    arrays = inputs()
    indices = np.pad(np.arange(S, dtype=np.int32), (0, 30), constant_values=-1)
    indices = np.broadcast_to(indices, (B, T, S + 30))
    o, lse = attend(*arrays, indices, latent_dim=C, scale=SCALE)
    expected_o, expected_lse = by_formula(*float64(arrays), indices)
    assert relative(o, expected_o) < 1e-6
    assert relative(lse, expected_lse) < 1e-6


def test_gradients():
    """Many queries share a key, and key 0 gets nothing from the places that hold -1."""
    arrays, indices = inputs(), random_indices()
    of_o, of_lse = normal(4, B, T, H, C), normal(5, B, T, H)
    seen = (indices >= 0).any(-1)[..., None]

    def total(q, kv):
        o, lse = sparse_mla(q, kv, indices, latent_dim=C, scale=SCALE)
        return jnp.sum(o * of_o) + jnp.sum(jnp.where(seen, lse, 0) * of_lse)

    def total_by_formula(q, kv):
        o, lse = by_formula(q, kv, indices)
        return np.sum(o * of_o) + np.sum(np.where(np.isfinite(lse), lse, 0) * of_lse)

    gradients = quick_jit(jax.grad(total, argnums=(0, 1)))(*arrays)
    assert_gradients(gradients, total_by_formula, arrays)
    assert not np.any(np.asarray(gradients[0])[0, 5])
    never = np.setdiff1d(np.arange(S), indices[0])
    indices_without_0 = np.where(indices == 0, -1, indices)
    d_kv = quick_jit(
        jax.grad(
            lambda kv: jnp.sum(sparse_mla(arrays[0], kv, indices_without_0, latent_dim=C, scale=SCALE)[0])
        )
    )(arrays[1])
    assert not np.any(np.asarray(d_kv)[:, 0])
    assert not np.any(np.asarray(d_kv)[0, never])
    assert not np.any(np.asarray(d_kv)[:, -1, :][~(indices == S - 1).any((1, 2))])


def test_gradients_where_no_query_sees_anything():
    arrays, indices = inputs(), np.full((B, T, K), -1, np.int32)

    def total(q, kv):
        o, lse = sparse_mla(q, kv, indices, latent_dim=C, scale=SCALE)
        return jnp.sum(o) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    o, lse = attend(*arrays, indices, latent_dim=C, scale=SCALE)
    assert not np.any(o)
    assert np.all(np.isneginf(lse))
    assert all(np.all(np.asarray(g) == 0) for g in quick_jit(jax.grad(total, argnums=(0, 1)))(*arrays))
