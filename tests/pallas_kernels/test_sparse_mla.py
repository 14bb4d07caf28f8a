"""Attention to selected keys against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_gradients, cosine_difference, normal, quick_jit, relative
from visible import packed, softmax

from pallas_kernels.platform import UnsupportedError, interpreted
from pallas_kernels.sparse_mla.api import sparse_mla

SCALE = 0.2  # not a power of two, in tests as in models: a query multiplied by it must not be rounded
attend = quick_jit(sparse_mla, static_argnames=("latent_dim", "scale", "implementation"))


class Case:
    """Queries, keys and a selection, dense formulas for everything."""

    def __init__(
        self, mask: np.ndarray, heads: int, latent: int, rope: int, dtype=jnp.float32, size: float = 1.0
    ):
        self.mask, self.latent = mask, latent
        (batch, queries, keys), width = mask.shape, latent + rope
        arrays = size * normal(0, batch, queries, heads, width), normal(1, batch, keys, width)
        self.q, self.kv = (jnp.asarray(x, dtype) for x in arrays)
        self.of_o, self.of_lse = normal(4, batch, queries, heads, latent), normal(5, batch, queries, heads)

    def selection(self, implementation: str, places: int | None = None, shuffled: bool = False) -> np.ndarray:
        """The mask as this implementation reads it."""
        if implementation == "tpu":
            return packed(self.mask)
        places = places or max(1, self.mask.sum(-1).max())
        indices = np.full((*self.mask.shape[:2], places), -1, np.int32)
        for b, t in np.ndindex(self.mask.shape[:2]):
            chosen = np.flatnonzero(self.mask[b, t])
            indices[b, t, : chosen.size] = chosen
        if shuffled:
            indices = np.random.default_rng(6).permuted(indices, axis=-1)
        return indices

    def forward(self, q, kv) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """o, lse and the probabilities [B, T, H, S], in float64."""
        scores = SCALE * np.einsum("bthx,bsx->bths", q, kv)
        p, lse = softmax(np.where(self.mask[:, :, None], scores, -np.inf))
        return np.einsum("bths,bsc->bthc", p, kv[..., : self.latent]), lse, p

    def total(self, q, kv) -> float:
        """What is differentiated."""
        o, lse, _ = self.forward(q, kv)
        return np.sum(o * self.of_o) + np.sum(np.where(np.isfinite(lse), lse, 0) * self.of_lse)

    def gradients(self, q, kv) -> tuple[np.ndarray, np.ndarray]:
        """Of the total, from the derivative of a softmax."""
        o, _, p = self.forward(q, kv)
        d_p = np.einsum("bthc,bsc->bths", self.of_o, kv[..., : self.latent])
        d_scores = SCALE * p * (d_p - np.sum(o * self.of_o, -1)[..., None] + self.of_lse[..., None])
        d_kv = np.einsum("bths,bthx->bsx", d_scores, q)
        d_kv[..., : self.latent] += np.einsum("bths,bthc->bsc", p, self.of_o)
        return np.einsum("bths,bsx->bthx", d_scores, kv), d_kv

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.q, np.float64), np.asarray(self.kv, np.float64)

    def run(self, implementation: str, **how):
        selection = self.selection(implementation, **how)
        options = {"latent_dim": self.latent, "scale": SCALE, "implementation": implementation}
        return attend(self.q, self.kv, selection, **options)

    def run_backward(self, implementation: str, **how):
        selection, seen = self.selection(implementation, **how), self.mask.any(-1)[..., None]
        options = {"latent_dim": self.latent, "scale": SCALE, "implementation": implementation}

        def total(q, kv):
            o, lse = sparse_mla(q, kv, selection, **options)
            return jnp.sum(o * self.of_o) + jnp.sum(jnp.where(seen, lse, 0) * self.of_lse)

        return quick_jit(jax.grad(total, argnums=(0, 1)))(self.q, self.kv)


def random_mask(seed: int, shape: tuple[int, int, int], k: int) -> np.ndarray:
    """k keys a query, some queries with fewer; a row without any, one with key 0 alone where there are so many."""
    random = np.random.RandomState(seed)
    mask = np.argsort(random.uniform(size=shape), axis=-1) < k
    mask &= random.uniform(size=shape) < np.linspace(0.5, 1, shape[1])[None, :, None]
    if shape[1] > 8:
        mask[0, 5] = False
        mask[-1, 8] = np.arange(shape[2]) == 0
    return mask


def documents(shape: tuple[int, int, int], k: int) -> np.ndarray:
    """Random selections of keys that are not later and of the query's own document."""
    mask = random_mask(7, shape, k)
    place = np.arange(shape[2]) - (shape[2] - shape[1])
    document = np.searchsorted([3, 11, 12], place, side="right")
    own = document[None, :] == document[-shape[1] :, None]
    return mask & own & (np.arange(shape[2]) <= np.arange(shape[1])[:, None] + shape[2] - shape[1])


def neighbours(shape: tuple[int, int, int], k: int) -> np.ndarray:
    """What a real selection looks like: queries share most of their keys."""
    random, mask = np.random.RandomState(8), np.zeros(shape, bool)
    shared = random.permutation(shape[2])[: 4 * k]
    for b, t in np.ndindex(shape[:2]):
        mask[b, t, random.permutation(shared)[:k]] = True
    return mask


CASES = {
    "lengths off the tile": lambda **how: Case(random_mask(2, (2, 37, 90), 20), 3, 24, 8, **how),
    "several documents": lambda **how: Case(documents((1, 40, 75), 9), 2, 16, 8, **how),
    "one query": lambda **how: Case(random_mask(3, (2, 1, 50), 7), 5, 24, 8, **how),
    "every key": lambda **how: Case(np.ones((1, 33, 45), bool), 3, 24, 8, **how),
    "equal scores": lambda **how: Case(random_mask(2, (2, 35, 60), 20), 3, 24, 8, size=0.0, **how),
    # More columns than the TPU works on at a time, and no multiple of them.
    "twenty heads": lambda **how: Case(random_mask(10, (1, 33, 40), 8), 20, 24, 8, **how),
    # As released: several groups of heads and chunks of features on every platform.
    "128 heads": lambda **how: Case(random_mask(11, (1, 9, 40), 12), 128, 512, 64, **how),
    "8192 keys": lambda **how: Case(neighbours((1, 20, 8192), 150), 4, 24, 8, **how),
}
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
on_gpu_too = pytest.mark.parametrize("implementation", ["reference", "gpu"], indirect=True)


@on_every_platform
@pytest.mark.parametrize("name", CASES)
def test_bfloat16(implementation, name):
    """What every backend promises: products are exact in float32, so the log-sum-exp is that of the same inputs."""
    case = CASES[name](dtype=jnp.bfloat16)
    o, lse = case.run(implementation)
    expected, expected_lse, _ = case.forward(*case.exact())
    assert (o.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative(o, expected) < 5e-3
    assert cosine_difference(o, expected) < 7e-6
    # On a GPU exponentials are good to 2 units in the last place.
    off = 5e-6 if implementation == jax.default_backend() == "gpu" else 2e-6
    np.testing.assert_allclose(lse, expected_lse, rtol=off / 2, atol=off)


@on_every_platform
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_gradients(implementation, name):
    case = CASES[name](dtype=jnp.bfloat16)
    for gradient, expected, array in zip(
        case.run_backward(implementation), case.gradients(*case.exact()), (case.q, case.kv), strict=True
    ):
        assert gradient.dtype == array.dtype
        if name == "one query" or np.any(expected):
            assert relative(gradient, expected) < 1e-2
        never = ~case.mask.any(-1 if gradient.ndim == 4 else 1)
        assert not np.any(np.asarray(gradient, np.float32)[never])


@pytest.mark.parametrize("implementation", ["tpu, races looked for"], indirect=True)
def test_copies_are_waited_for(implementation):
    """Two blocks of queries that share keys, whose gradients add up."""
    case = Case(random_mask(9, (1, 40, 64), 12), 2, 24, 8, dtype=jnp.bfloat16)
    for gradient, expected in zip(
        case.run_backward(implementation), case.gradients(*case.exact()), strict=True
    ):
        assert relative(gradient, expected) < 1e-2


@pytest.mark.parametrize("implementation", ["tpu, two cores"], indirect=True)
@pytest.mark.parametrize("queries", [20, 70])
def test_two_cores_add_up(implementation, queries):
    """Each has blocks of queries of its own, or one has none, and both add to the same keys."""
    case = Case(random_mask(12, (1, queries, 40), 8), 3, 24, 8, dtype=jnp.bfloat16)
    for gradient, expected in zip(
        case.run_backward(implementation), case.gradients(*case.exact()), strict=True
    ):
        assert relative(gradient, expected) < 1e-2


@on_every_platform
def test_nobody_selects_anything(implementation):
    case = Case(np.zeros((2, 37, 90), bool), 3, 24, 8, dtype=jnp.bfloat16)
    o, lse = case.run(implementation)
    assert not np.any(np.asarray(o, np.float32))
    assert np.all(np.isneginf(lse))
    assert all(not np.any(np.asarray(g, np.float32)) for g in case.run_backward(implementation))


@on_gpu_too
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_float32(implementation, size):
    """Also where scores reach thousands, whose exponentials no float holds; keys in no order, -1 anywhere."""
    case = CASES["lengths off the tile"](size=size)
    o, lse = case.run(implementation, shuffled=True)
    expected_o, expected_lse, _ = case.forward(*case.exact())
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    assert relative(o, expected_o) < 1e-6 * max(1, size / 10)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(o)[0, 5])


@on_gpu_too
def test_more_places_than_keys(implementation):
    """A list longer than there are keys: every key once, -1 behind."""
    case = CASES["every key"]()
    o, lse = case.run(implementation, places=75)
    expected_o, expected_lse, _ = case.forward(*case.exact())
    assert relative(o, expected_o) < 1e-6
    assert relative(lse, expected_lse) < 1e-6


@on_gpu_too
def test_float32_gradients(implementation):
    """Many queries share a key, and key 0 gets nothing from the places that hold -1."""
    case = CASES["lengths off the tile"]()
    gradients = case.run_backward(implementation, shuffled=True, places=300)
    assert_gradients(gradients, case.total, (case.q, case.kv))
    assert_gradients(case.gradients(*case.exact()), case.total, (case.q, case.kv))
    case.mask[..., 0] = False
    d_kv = case.run_backward(implementation)[1]
    assert not np.any(np.asarray(d_kv)[:, 0])


def test_a_selection_in_the_other_form_is_refused():
    case = CASES["one query"](dtype=jnp.bfloat16)
    options = {"latent_dim": case.latent, "scale": SCALE}
    with pytest.raises(UnsupportedError, match=r"sparse_mla.*list of int32.*given uint32\[2, 1, 50\]"):
        sparse_mla(case.q, case.kv, packed(case.mask), **options)
    with interpreted("tpu"):
        with pytest.raises(UnsupportedError, match=r"packed mask, uint32\[B, 1, 50\].*given int32\[2, 1, "):
            sparse_mla(case.q, case.kv, case.selection("reference"), **options)
        with pytest.raises(
            UnsupportedError, match=r"packed mask, uint32\[B, 1, 50\].*given uint32\[2, 1, 32\]"
        ):
            sparse_mla(case.q, case.kv, packed(case.mask)[..., :32], **options)
