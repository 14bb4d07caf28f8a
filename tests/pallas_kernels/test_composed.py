"""Indexer, selection, attention and loss together: one gradient, and none that leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numerics import normal, quick_jit, relative
from visible import documents

from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import sparse_indexer_loss
from pallas_kernels.selection import unpack_mask
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import select, topk_mask

B, T, H, C, R, N, J, S, K = 2, 12, 3, 8, 4, 3, 6, 30, 7
SCALE = 0.3
VISIBILITY = documents(B, T, S)
OF_O, OF_KL = normal(8, B, T, H, C), normal(9, B, T)
NAMES = ("index_q", "index_k", "index_w", "q", "kv")


def arrays(dtype) -> list:
    shapes = [(B, T, N, J), (B, S, J), (B, T, N), (B, T, H, C + R), (B, S, C + R)]
    return [jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


def composed(index_q, index_k, index_w, q, kv, implementation=None, detached=False):
    """Output and loss, weighted and summed apart."""
    index = (index_q, index_k, index_w)
    scores = index_scores(*index, VISIBILITY, implementation=implementation)
    selection = select(scores, K, implementation=implementation)
    how = {"scale": SCALE, "implementation": implementation}
    o, lse = sparse_mla(q, kv, selection, latent_dim=C, **how)
    if detached:
        index = jax.lax.stop_gradient(index)
    kl = sparse_indexer_loss(*index, q, kv, lse, selection, **how)
    return jnp.sum(o * OF_O), jnp.sum(kl * OF_KL)


def in_plain_jnp(index_q, index_k, index_w, q, kv, selected):
    """The same from the formulas, densely, with the selection and the target as constants."""
    scores = jnp.einsum("btn,btns->bts", index_w, jax.nn.relu(jnp.einsum("btnj,bsj->btns", index_q, index_k)))
    attention = jnp.einsum("bthx,bsx->bhts", q, kv) * SCALE
    seen = jnp.any(selected, -1)
    p = jax.nn.softmax(jnp.where(selected[:, None], attention, -1e30), axis=-1) * seen[:, None, :, None]
    o = jnp.einsum("bhts,bsc->bthc", p, kv[..., :C])
    target = jax.lax.stop_gradient(jnp.mean(p, axis=1))
    log_q = jax.nn.log_softmax(jnp.where(selected, scores, -1e30), axis=-1)
    kl = jnp.sum(jnp.where(selected, target * (jnp.log(jnp.where(target > 0, target, 1)) - log_q), 0), -1)
    return jnp.sum(o * OF_O), jnp.sum(kl * OF_KL)


def selected_of(index) -> np.ndarray:
    scores = index_scores(*index, VISIBILITY, implementation="reference")
    return np.asarray(unpack_mask(topk_mask(scores, K, implementation="reference"), T))


@pytest.mark.slow
def test_gradients_in_float64():
    with jax.enable_x64(True):
        inputs = arrays(jnp.float64)
        # The target of the loss is a constant to its gradient and not to a difference: of q and kv, the output alone.
        attention, index = inputs[3:], inputs[:3]
        how = {"order": 1, "modes": ["rev"], "rtol": 1e-6, "atol": 1e-6}
        check_grads(jax.jit(lambda *a: composed(*index, *a)[0]), attention, **how)
        check_grads(jax.jit(lambda *a: composed(*a, *attention)[1]), index, **how)
        found = quick_jit(jax.grad(lambda *a: sum(composed(*a)), argnums=range(5)))(*inputs)
        plain = functools.partial(in_plain_jnp, selected=selected_of(inputs[:3]))
        expected = quick_jit(jax.grad(lambda *a: sum(plain(*a)), argnums=range(5)))(*inputs)
    for name, gradient, right in zip(NAMES, found, expected, strict=True):
        assert relative(gradient, right) < 1e-12, name


@functools.cache
def weighted_gradients(implementation: str, detached: bool = False):
    """By all inputs, of the sum of output and loss, each times a weight: one program for every question below."""

    def total(inputs, of_output, of_loss):
        o, kl = composed(*inputs, implementation, detached)
        return of_output * o + of_loss * kl

    return quick_jit(jax.grad(total))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
def test_gradients_of_every_platform(implementation):
    """In bfloat16, against the composition in float64 on the same numbers and selection."""
    inputs = arrays(jnp.bfloat16)
    found = weighted_gradients(implementation)(inputs, 1.0, 1.0)
    selected = selected_of(inputs[:3])
    with jax.enable_x64(True):
        exact = [x.astype(jnp.float64) for x in inputs]
        plain = functools.partial(in_plain_jnp, selected=selected)
        expected = quick_jit(jax.grad(lambda *a: sum(plain(*a)), argnums=range(5)))(*exact)
    for name, gradient, right in zip(NAMES, found, expected, strict=True):
        assert relative(gradient, right) < 1e-2, name


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
def test_no_gradient_leaks(implementation):
    """From the output to the indexer, from the loss to attention, and, the indexer detached, from the loss at all."""
    inputs = arrays(jnp.bfloat16)

    def reached(*weights, detached=False):
        found = weighted_gradients(implementation, detached)(inputs, *weights)
        return [bool(np.any(np.asarray(gradient, np.float32))) for gradient in found]

    assert reached(1.0, 0.0) == [False] * 3 + [True] * 2
    assert reached(0.0, 1.0) == [True] * 3 + [False] * 2
    assert reached(0.0, 1.0, detached=True) == [False] * 5
