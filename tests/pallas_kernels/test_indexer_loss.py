"""The indexer's loss in both forms: ``KL(p ‖ softmax(I))`` on the attended set, its gradient ``softmax(I) - p``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal, quick_jit, relative
from visible import documents, everyone, packed, softmax

from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.sparse_mla.api import sparse_mla

B, H, T, S, C, R, K = 2, 3, 23, 60, 16, 8, 14
SCALE = 0.25


def index_of(scores):
    """Queries, keys and weights of an indexer that has these scores: ``s = ReLU(s) - ReLU(-s)``."""
    keys = jnp.broadcast_to(jnp.eye(S, dtype=scores.dtype), (B, S, S))
    return jnp.stack([scores, -scores], axis=2), keys, jnp.broadcast_to(jnp.array([1.0, -1.0]), (B, T, 2))


class Case:
    """The same attention in both forms: heads share one key row; a row without keys, one with a single key."""

    def __init__(self, size: float, dtype=jnp.float32):
        self.scores = jnp.asarray(size * normal(0, B, T, S), dtype)
        self.q = jnp.asarray(1.5 * normal(1, B, T, H, C + R), dtype)
        self.kv = jnp.asarray(normal(2, B, S, C + R), dtype)
        self.cotangent = normal(4, B, T)
        random = np.random.RandomState(3)
        keys = np.stack([np.sort(random.permutation(S)[:K]) for _ in range(B * T)]).reshape(B, T, K)
        keys[random.uniform(size=keys.shape) < 0.2] = -1
        keys[0, 5] = -1
        keys[1, 7] = np.where(np.arange(K) == 3, 11, -1)
        self.indices = keys.astype(np.int32)
        self.mask = np.zeros((B, T, S + 1), bool)
        np.put_along_axis(self.mask, keys, True, axis=-1)
        self.mask = self.mask[..., :S]

    def dense(self, scores, q, kv, implementation: str = "reference"):
        q, k = q.swapaxes(1, 2), jnp.broadcast_to(kv[:, None], (B, H, S, C + R))
        attended, how = (
            (everyone(B, T, S), packed(self.mask)),
            {"implementation": implementation, "scale": SCALE},
        )
        _, lse = dense_mla(q, k, k, *attended, **how)
        return dense_indexer_loss(scores, q, k, lse, *attended, **how)

    def sparse(self, scores, q, kv, implementation: str = "reference"):
        selection = packed(self.mask) if implementation == "tpu" else self.indices
        how = {"implementation": implementation, "scale": SCALE}
        _, lse = sparse_mla(q, kv, selection, latent_dim=C, **how)
        return sparse_indexer_loss(*index_of(scores), q, kv, lse, selection, **how)

    def by_formula(self) -> tuple[np.ndarray, np.ndarray]:
        """KL [B, T] and its gradient with respect to the scores [B, T, S], each row times its cotangent."""
        kl, gradient = np.zeros((B, T)), np.zeros((B, T, S))
        scores, q, kv = (np.asarray(x, np.float64) for x in (self.scores, self.q, self.kv))
        for b, t in np.ndindex(B, T):
            keys = np.flatnonzero(self.mask[b, t])
            if keys.size:
                p = softmax(SCALE * q[b, t] @ kv[b, keys].T)[0].mean(0)
                predicted = softmax(scores[b, t, keys])[0]
                kl[b, t] = np.sum(p * np.log(p / predicted))
                gradient[b, t, keys] = (predicted - p) * self.cotangent[b, t]
        return kl, gradient

    def check(self, form: str, implementation: str, tolerance: float, gradient_tolerance: float) -> None:
        loss = functools.partial(getattr(self, form), implementation=implementation)
        kl = quick_jit(loss)(self.scores, self.q, self.kv)
        expected, expected_gradient = self.by_formula()
        assert (kl.dtype, kl.shape) == (jnp.float32, (B, T))
        assert relative(kl, expected) < tolerance
        assert kl[0, 5] == 0
        assert abs(kl[1, 7]) < 1e-6
        total = quick_jit(jax.grad(lambda *a: jnp.sum(loss(*a) * self.cotangent), argnums=(0, 1, 2)))
        d_scores, d_q, d_kv = total(self.scores, self.q, self.kv)
        assert relative(d_scores, expected_gradient) < gradient_tolerance
        assert not np.any(np.asarray(d_scores)[~self.mask])
        assert not np.any(d_q)
        assert not np.any(d_kv)


@pytest.fixture(scope="module", params=[1.0, 20.0], ids=["flat", "peaked"])
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_loss_and_gradient(case, form):
    case.check(form, "reference", 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("implementation", "form"),
    [(name, form) for name in ("reference", "tpu", "gpu") for form in ("dense", "sparse")],
    indirect=["implementation"],
)
@pytest.mark.parametrize("size", [1.0, 20.0], ids=["flat", "peaked"])
def test_bfloat16(implementation, form, size):
    """What every backend promises, against the formula on the same rounded inputs."""
    Case(size, jnp.bfloat16).check(form, implementation, 1e-4, 1e-2)


@pytest.mark.parametrize("implementation", ["tpu, races looked for"], indirect=True)
def test_copies_are_waited_for(implementation):
    Case(1.0, jnp.bfloat16).check("sparse", implementation, 1e-4, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "tpu", "tpu, two cores", "gpu"], indirect=True)
@pytest.mark.parametrize(("queries", "heads", "index_heads"), [(1, 3, 6), (40, 3, 6), (40, 20, 24)])
def test_index_heads_of_both_signs(implementation, queries, heads, index_heads):
    """Many heads, two blocks of queries, gradients to queries, keys and weights against the reference's in float32.

    20 and 24 heads are more columns than the TPU works on at a time, and no multiple of them.
    """
    keys = 70
    mask = np.random.RandomState(5).uniform(size=(1, queries, keys)) < 0.4
    indices = np.where(mask, np.arange(keys), -1).astype(np.int32)
    shapes = [
        (1, queries, index_heads, 16),
        (1, keys, 16),
        (1, queries, index_heads),
        (1, queries, heads, C + R),
        (1, keys, C + R),
    ]
    arrays = [jnp.asarray(normal(10 + i, *shape), jnp.bfloat16) for i, shape in enumerate(shapes)]
    arrays[2] = arrays[2].astype(jnp.float32)
    exact = [x.astype(jnp.float32) for x in arrays]
    lse = sparse_mla(*exact[3:], indices, latent_dim=C, scale=SCALE, implementation="reference")[1]

    def gradients(implementation, selection, arrays):
        def total(*index):
            kl = sparse_indexer_loss(
                *index, *arrays[3:], lse, selection, scale=SCALE, implementation=implementation
            )
            return jnp.sum(kl * np.arange(1, queries + 1))

        return quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays[:3])

    loss, found = gradients(implementation, packed(mask) if implementation == "tpu" else indices, arrays)
    exact_loss, exact_found = gradients("reference", indices, exact)
    assert relative(loss, exact_loss) < 1e-3
    for gradient, expected, array in zip(found, exact_found, arrays, strict=False):
        assert gradient.dtype == array.dtype
        assert relative(gradient, expected) < 1e-2


@pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
def test_warm_up_over_documents(implementation):
    """Everything that is visible, several tiles, many of which nobody looks into."""
    visibility, heads = documents(2, 300, 1100), 3
    mask = np.asarray(visibility.mask())
    scores = np.where(mask, normal(0, *mask.shape), -np.inf)
    q, k = 1.5 * normal(1, 2, heads, 300, 24), normal(2, 2, heads, 1100, 24)
    attention, lse = softmax(
        np.where(mask[:, None], SCALE * q.astype(np.float64) @ k.swapaxes(2, 3), -np.inf)
    )
    p, predicted = attention.mean(1), softmax(scores.astype(np.float64))[0]
    expected = np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(predicted > 0, predicted, 1)), -1)

    def loss(scores):
        return dense_indexer_loss(
            scores, q, k, lse.astype(np.float32), visibility, scale=SCALE, implementation=implementation
        )

    assert relative(quick_jit(loss)(scores), expected) < 1e-5
    gradient = quick_jit(jax.grad(lambda scores: jnp.sum(loss(scores))))(scores)
    assert relative(gradient, predicted - p) < 1e-5


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
            scores[b, t, keys] = np.log(softmax(SCALE * case.q[b, t] @ case.kv[b, keys].T)[0].mean(0)) + 3.0
    kl = quick_jit(getattr(case, form))(scores, case.q, case.kv)
    np.testing.assert_allclose(kl, np.zeros((B, T)), atol=2e-6)
