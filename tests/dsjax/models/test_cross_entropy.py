"""Blocked cross-entropy with hand-made gradients against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.models import cross_entropy
from dsjax.models.cross_entropy import cross_entropy_sum, token_nll


def numpy_cross_entropy(hidden, head, targets, weights):
    """Loss, and its gradients by the textbook formula ``softmax - onehot``."""
    h, w = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64), head.astype(np.float64)
    logits = h @ w
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, flat = np.arange(len(h)), targets.reshape(-1)
    nll = -log_p[rows, flat]
    d_logits = np.exp(log_p)
    d_logits[rows, flat] -= 1
    d_logits *= weights.reshape(-1, 1)
    loss = float((nll * weights.reshape(-1)).sum())
    return nll.reshape(targets.shape), loss, (d_logits @ w.T).reshape(hidden.shape), h.T @ d_logits


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 50, 24)).astype(np.float32)
    head = rng.normal(size=(24, 200)).astype(np.float32)
    targets = rng.integers(0, 200, (3, 50)).astype(np.int32)
    weights = (rng.random((3, 50)) < 0.7).astype(np.float32) * 0.5
    return hidden, head, targets, weights


@pytest.mark.parametrize("logits_at_once", [200 * 7, 200 * 64, 1 << 24])
def test_loss_and_gradients(case, logits_at_once, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LOGITS_AT_ONCE", logits_at_once)
    nll, loss, d_hidden, d_head = numpy_cross_entropy(*case)
    hidden, head, targets, weights = map(jnp.asarray, case)
    scaled = jax.value_and_grad(lambda h, w: 3 * cross_entropy_sum(h, w, targets, weights), (0, 1))
    value, gradients = scaled(hidden, head)
    assert float(value) == pytest.approx(3 * loss, rel=1e-6)
    for ours, expected in zip(gradients, (d_hidden, d_head), strict=True):
        assert np.linalg.norm(ours - 3 * expected) < 2e-6 * np.linalg.norm(3 * expected)
    np.testing.assert_allclose(token_nll(hidden, head, targets), nll, rtol=2e-6, atol=2e-6)


def test_bfloat16_hidden_states_get_bfloat16_gradients(case):
    hidden, head, targets, weights = map(jnp.asarray, case)
    _, loss, d_hidden, _ = numpy_cross_entropy(*case)
    f = jax.value_and_grad(lambda h: cross_entropy_sum(h, head, targets, weights))
    value, gradient = f(hidden.astype(jnp.bfloat16))
    assert float(value) == pytest.approx(loss, rel=1e-2)
    assert gradient.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(gradient, np.float64) - d_hidden) < 2e-2 * np.linalg.norm(d_hidden)


def test_logits_of_all_tokens_are_never_held():
    shapes = (
        jax.ShapeDtypeStruct((1, 8192, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 32_768), jnp.float32),
    )
    targets = jnp.zeros((1, 8192), jnp.int32)
    f = jax.grad(lambda h, w: cross_entropy_sum(h, w, targets, jnp.ones(targets.shape)), (0, 1))
    memory = jax.jit(f).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 8192 * 32_768 * 4
