"""The indexer's loss in both forms: ``KL(p ‖ softmax(I))`` on the attended set, its gradient ``softmax(I) - p``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal, quick_jit, relative
from visible import everyone, packed

from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.sparse_mla.api import sparse_mla

B, H, T, S, C, R, K = 2, 3, 23, 60, 16, 8, 14
SCALE = 0.25


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def index_of(scores):
    """Queries, keys and weights of an indexer that has these scores: ``s = ReLU(s) - ReLU(-s)``."""
    keys = jnp.broadcast_to(jnp.eye(S), (B, S, S))
    return jnp.stack([scores, -scores], axis=2), keys, jnp.broadcast_to(jnp.array([1.0, -1.0]), (B, T, 2))


class Case:
    """The same attention in both forms: heads share one key row; a row without keys, one with a single key."""

    def __init__(self, size: float):
        self.scores = jnp.asarray(size * normal(0, B, T, S))
        self.q, self.kv = 1.5 * normal(1, B, T, H, C + R), normal(2, B, S, C + R)
        random = np.random.RandomState(3)
        keys = np.stack([np.sort(random.permutation(S)[:K]) for _ in range(B * T)]).reshape(B, T, K)
        keys[random.uniform(size=keys.shape) < 0.2] = -1
        keys[0, 5] = -1
        keys[1, 7] = np.where(np.arange(K) == 3, 11, -1)
        self.indices = keys.astype(np.int32)
        self.mask = np.zeros((B, T, S + 1), bool)
        np.put_along_axis(self.mask, keys, True, axis=-1)
        self.mask = self.mask[..., :S]

    def dense(self, scores, q, kv):
        q, k = q.swapaxes(1, 2), jnp.broadcast_to(kv[:, None], (B, H, S, C + R))
        attended = everyone(B, T, S), packed(self.mask)
        _, lse = dense_mla(q, k, k, *attended, scale=SCALE)
        return dense_indexer_loss(scores, q, k, lse, *attended, scale=SCALE)

    def sparse(self, scores, q, kv):
        _, lse = sparse_mla(q, kv, self.indices, latent_dim=C, scale=SCALE)
        return sparse_indexer_loss(*index_of(scores), q, kv, lse, self.indices, scale=SCALE)

    def by_formula(self) -> tuple[np.ndarray, np.ndarray]:
        """KL [B, T] and its gradient with respect to the scores [B, T, S]."""
        kl, gradient = np.zeros((B, T)), np.zeros((B, T, S))
        scores, q, kv = (np.asarray(x, np.float64) for x in (self.scores, self.q, self.kv))
        for b, t in np.ndindex(B, T):
            keys = np.flatnonzero(self.mask[b, t])
            if keys.size:
                p = softmax(SCALE * q[b, t] @ kv[b, keys].T).mean(0)
                predicted = softmax(scores[b, t, keys])
                kl[b, t] = np.sum(p * np.log(p / predicted))
                gradient[b, t, keys] = predicted - p
        return kl, gradient


@pytest.fixture(scope="module", params=[1.0, 20.0], ids=["flat", "peaked"])
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_loss_and_gradient(case, form):
    loss = getattr(case, form)
    kl = quick_jit(loss)(case.scores, case.q, case.kv)
    expected, expected_gradient = case.by_formula()
    assert (kl.dtype, kl.shape) == (jnp.float32, (B, T))
    assert relative(kl, expected) < 1e-5
    assert kl[0, 5] == 0
    assert abs(kl[1, 7]) < 1e-6
    total = quick_jit(jax.grad(lambda *a: jnp.sum(loss(*a)), argnums=(0, 1, 2)))
    d_scores, d_q, d_kv = total(case.scores, jnp.asarray(case.q), jnp.asarray(case.kv))
    assert relative(d_scores, expected_gradient) < 1e-5
    assert not np.any(np.asarray(d_scores)[~case.mask])
    assert not np.any(d_q)
    assert not np.any(d_kv)


def test_scores_that_are_not_attended_to_do_not_matter(case):
    """Whatever they are: causality and padding leave -inf there as well as large numbers."""
    loss = quick_jit(jax.value_and_grad(lambda *a: jnp.sum(case.dense(*a))))
    value, gradient = loss(case.scores, case.q, case.kv)
    for other in (-np.inf, np.inf, 1e30):
        scores = jnp.where(case.mask, case.scores, other)
        other_value, other_gradient = loss(scores, case.q, case.kv)
        assert float(other_value) == float(value)
        np.testing.assert_array_equal(other_gradient, gradient)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_the_loss_is_zero_for_an_indexer_that_knows_the_attention(form):
    case = Case(1.0)
    scores = np.asarray(case.scores).copy()
    for b, t in np.ndindex(B, T):
        keys = np.flatnonzero(case.mask[b, t])
        if keys.size:
            scores[b, t, keys] = np.log(softmax(SCALE * case.q[b, t] @ case.kv[b, keys].T).mean(0)) + 3.0
    kl = quick_jit(getattr(case, form))(scores, case.q, case.kv)
    np.testing.assert_allclose(kl, np.zeros((B, T)), atol=2e-6)
