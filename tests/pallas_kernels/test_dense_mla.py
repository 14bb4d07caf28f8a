"""Masked multi-head attention against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_gradients, cosine_difference, normal, quick_jit, relative
from visible import documents, everyone, packed, softmax

from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.platform import UnsupportedError, interpreted

SCALE = 0.3  # not a power of two, in tests as in models: a query multiplied by it must not be rounded
HEADS = 3
attend = quick_jit(dense_mla, static_argnames=("scale", "implementation"))
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)


class Case:
    """Queries, keys, values and who attends to whom: by the limits alone, or by a selection."""

    def __init__(self, visibility, mask=None, dtype=jnp.float32, size: float = 1.0, widths=(24, 16)):
        self.limits = (visibility,) if mask is None else (visibility, packed(mask))
        self.mask = np.asarray(visibility.mask()) if mask is None else mask
        batch, queries, keys = self.mask.shape
        q = size * normal(0, batch, HEADS, queries, widths[0])
        k, v = normal(1, batch, HEADS, keys, widths[0]), normal(2, batch, HEADS, keys, widths[1])
        self.arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        self.of_o, self.of_lse = normal(4, batch, HEADS, queries, widths[1]), normal(5, batch, HEADS, queries)

    def exact(self) -> list[np.ndarray]:
        return [np.asarray(x, np.float64) for x in self.arrays]

    def forward(self, q, k, v) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """o, lse and the probabilities, in float64."""
        scores = SCALE * q @ k.swapaxes(2, 3)
        p, lse = softmax(np.where(self.mask[:, None], scores, -np.inf))
        return p @ v, lse, p

    def total(self, q, k, v) -> float:
        """What is differentiated."""
        o, lse, _ = self.forward(q, k, v)
        return np.sum(o * self.of_o) + np.sum(np.where(np.isfinite(lse), lse, 0) * self.of_lse)

    def gradients(self, q, k, v) -> tuple[np.ndarray, ...]:
        """Of the total, from the derivative of a softmax."""
        o, _, p = self.forward(q, k, v)
        d_p = self.of_o @ v.swapaxes(2, 3)
        d_scores = SCALE * p * (d_p - np.sum(o * self.of_o, -1)[..., None] + self.of_lse[..., None])
        return d_scores @ k, d_scores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ self.of_o

    def run(self, implementation: str):
        return attend(*self.arrays, *self.limits, scale=SCALE, implementation=implementation)

    def run_backward(self, implementation: str):
        seen = self.mask.any(-1)[:, None]

        def total(q, k, v):
            o, lse = dense_mla(q, k, v, *self.limits, scale=SCALE, implementation=implementation)
            return jnp.sum(o * self.of_o) + jnp.sum(jnp.where(seen, lse, 0) * self.of_lse)

        return quick_jit(jax.grad(total, argnums=(0, 1, 2)))(*self.arrays)


def selected(batch: int, queries: int, keys: int, **how) -> Case:
    """About a third of the keys; a row without any and one with a single one."""
    mask = np.random.RandomState(3).uniform(size=(batch, queries, keys)) < 0.3
    if queries > 7:
        mask[0, 5] = False
        mask[-1, 7] = np.arange(keys) == 11
    return Case(everyone(batch, queries, keys), mask, **how)


CASES = {
    "a selection": lambda **how: selected(2, 37, 53, **how),
    "a selection of several tiles": lambda **how: selected(1, 300, 1100, **how),
    "documents": lambda **how: Case(documents(2, 290, 1100), **how),
    "one query": lambda **how: Case(documents(2, 1, 90), **how),
    "equal scores": lambda **how: selected(2, 40, 60, size=0.0, **how),
    "released widths, 8192 keys": lambda **how: Case(documents(1, 20, 8192), widths=(192, 128), **how),
    "blocks that nobody sees in a length off the tile": lambda **how: Case(documents(1, 330, 330), **how),
}


@on_every_platform
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_float32(implementation, size):
    """Also where scores reach thousands, whose exponentials no float holds."""
    case = CASES["a selection"](size=size)
    o, lse = case.run(implementation)
    expected_o, expected_lse, _ = case.forward(*case.exact())
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    # Scores of size n are right to n units in the last place, and so is what follows from them.
    assert relative(o, expected_o) < 1e-6 * max(1, size / 10)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(o)[0, :, 5])


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
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=2e-6)


@on_every_platform
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_gradients(implementation, name):
    case = CASES[name](dtype=jnp.bfloat16)
    found = case.run_backward(implementation)
    for gradient, expected, array in zip(found, case.gradients(*case.exact()), case.arrays, strict=True):
        assert gradient.dtype == array.dtype
        error = np.asarray(gradient, np.float64) - expected  # both may be zero
        assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(expected)


@on_every_platform
def test_gradients(implementation):
    case = CASES["a selection"]()
    gradients = case.run_backward(implementation)
    assert_gradients(gradients, case.total, case.arrays)
    assert_gradients(case.gradients(*case.exact()), case.total, case.arrays)
    assert not np.any(np.asarray(gradients[0])[0, :, 5])


@on_every_platform
def test_no_query_sees_anything(implementation):
    case = Case(everyone(2, 37, 53), np.zeros((2, 37, 53), bool))
    o, lse = case.run(implementation)
    assert not np.any(o)
    assert np.all(np.isneginf(lse))
    assert all(np.all(np.asarray(g) == 0) for g in case.run_backward(implementation))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_mask_of_another_size_is_refused(platform):
    case = CASES["a selection"]()
    with (
        interpreted(platform),
        pytest.raises(UnsupportedError, match=r"packed mask, uint32\[B, 2, 53\].*\[2, 1, 53\]"),
    ):
        dense_mla(*case.arrays, case.limits[0], case.limits[1][:, :1], scale=SCALE)


def test_heads_too_wide_for_a_gpu_are_refused():
    case = selected(1, 3, 4, widths=(200, 128))
    with interpreted("gpu"), pytest.raises(UnsupportedError, match=r"200 and 128 wide.* 320 together"):
        dense_mla(*case.arrays, *case.limits, scale=SCALE)
