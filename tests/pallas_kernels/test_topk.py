"""The selection against a sort: the highest scores among the visible, ties to the lowest index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import normal, quick_jit
from sorted_selection import check_selection, mask_of, selected_by_sorting
from visible import packed

from pallas_kernels.selection import unpack_mask
from pallas_kernels.topk import gpu
from pallas_kernels.topk.api import topk_mask

on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)


def check(implementation: str, scores: np.ndarray, visible: np.ndarray, k: int) -> None:
    scores = np.where(visible, scores, -np.inf).astype(scores.dtype)
    check_selection(implementation, scores.reshape(-1, *scores.shape[-2:]), k)


def causal(rows: int, keys: int) -> np.ndarray:
    return np.arange(keys) <= np.arange(rows)[:, None] + keys - rows


_HALF = np.where(np.arange(300) % 2, 0.25, normal(1, 40, 300))
SCORES = {
    "random": normal(0, 40, 300),
    "all equal": np.full((40, 300), 1.5, np.float32),
    "half constant": _HALF.astype(np.float32),
    "plateau of zeros above negatives": np.where(normal(2, 40, 300) > 0, 0, -np.abs(_HALF)).astype(
        np.float32
    ),
    "zeros of both signs": np.where(np.arange(300) % 3, 0.0, -0.0).astype(np.float32)
    * np.ones((40, 1), np.float32),
    "negative": -np.abs(normal(3, 40, 300)),
    "few values": np.round(normal(4, 40, 300)),
    "all magnitudes": normal(5, 40, 300) * 10.0 ** np.linspace(-30, 30, 300, dtype=np.float32),
    "neighbouring floats": (np.float32(1) + np.float32(2**-23) * np.round(3 * normal(6, 40, 300))).astype(
        np.float32
    ),
    "infinities": np.where(normal(7, 40, 300) > 1, np.inf, np.where(normal(8, 40, 300) > 0, -np.inf, _HALF)),
}


@on_every_platform
@pytest.mark.parametrize("k", [1, 64, 299])
@pytest.mark.parametrize("name", SCORES)
def test_selection(implementation, name, k):
    """All keys visible, only earlier ones, and a few anywhere (rows without any, and with fewer than k)."""
    scores = np.asarray(SCORES[name], np.float32)
    few = np.random.RandomState(9).uniform(size=scores.shape) < np.linspace(0, 0.6, 40)[:, None]
    for visible in (np.ones(scores.shape, bool), causal(40, 300), few):
        check(implementation, scores, visible, k)


@on_every_platform
def test_a_hundred_seeds(implementation):
    """Longer than a block of keys, four kinds of scores a seed."""
    keys, rows = 2500, []
    for seed in range(100):
        scores = normal(1000 + seed, keys)
        halves = np.where(np.arange(keys) % 2, 0.5, scores)
        rows += [scores, np.round(scores), halves, np.maximum(scores, 0)]
    scores = np.stack(rows).astype(np.float32)
    visible = np.arange(keys) <= np.linspace(0, 1.3 * keys, len(rows), dtype=int)[:, None]
    check(implementation, scores, visible, 512)


@pytest.mark.parametrize("implementation", ["tpu, races looked for"], indirect=True)
@pytest.mark.parametrize("name", ["random", "half constant"])
def test_copies_are_waited_for(implementation, name):
    """Two blocks of rows and of keys, ties at the threshold or none."""
    scores = np.tile(np.asarray(SCORES[name], np.float32), (1, 1, 7))
    check(implementation, scores, causal(40, 2100), 64)


@on_every_platform
@pytest.mark.parametrize("k", [300, 301, 512])
def test_k_of_all_keys_or_more_takes_the_visible(implementation, k):
    check(implementation, normal(0, 40, 300), causal(40, 300), k)


@on_every_platform
def test_eight_thousand_keys(implementation):
    """Half of the scores are zero, as behind a ReLU: most rows end inside the plateau."""
    scores = np.maximum(normal(0, 2, 3, 8192), 0)
    scores[0] -= np.float32(0.5)
    visible = np.broadcast_to(causal(3, 8192), scores.shape).copy()
    visible[1, 2, 4000:] = False
    check(implementation, scores, visible, 2048)
    check(implementation, np.where(scores > 1, scores, 0).astype(np.float32), visible, 2048)


@pytest.mark.parametrize("implementation", ["gpu"], indirect=True)
@pytest.mark.parametrize("rows_are_long", [False, True])
def test_rows_whose_sample_misleads(implementation, rows_are_long, monkeypatch):
    """More reach what was sampled than there is room for, or fewer than k; two programs, so that room is used again."""
    monkeypatch.setattr(gpu, "_PROGRAMS", 2)
    monkeypatch.setattr(gpu, "_FEW_ROWS", 0)
    monkeypatch.setattr(gpu, "_LONG_ROW", 1000 if rows_are_long else 1 << 18)
    length, k = 16384, 30
    scores = normal(0, 7, length)
    scores[1] = 2.5
    high = slice(0, 24 * 16, 16)  # where samples of either stride look
    scores[2, high] += 100
    scores[3, high] = np.inf
    scores[4] = np.where(np.arange(length) % 2, 0.0, -0.0)
    scores[5] = -np.inf
    check(implementation, scores[None], np.ones((1, 7, length), bool), k)


@on_every_platform
def test_one_row_and_low_precision(implementation):
    scores = jnp.asarray(normal(0, 1, 1, 500), jnp.bfloat16)  # 8 bits: many ties
    check(implementation, np.asarray(scores.astype(jnp.float32)), np.ones((1, 500), bool), 100)
    expected = selected_by_sorting(np.asarray(scores.astype(jnp.float32)), 100)
    np.testing.assert_array_equal(mask_of(scores, 100, implementation=implementation), packed(expected))


_VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 3e38, -3e38, 1e-30]) | st.floats(
    allow_nan=False, allow_subnormal=False, width=32
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(_VALUES, st.booleans()), min_size=24, max_size=24), st.sampled_from([1, 5, 23, 24, 30])
)
def test_any_row(row, k):
    """The reference alone: its interpreted rivals take too long for so many rows."""
    scores, visible = np.array([s for s, _ in row], np.float32), np.array([v for _, v in row])
    check("reference", scores[None], visible[None], k)


@on_every_platform
def test_nothing_is_learnt_through_the_selection(implementation):
    scores = normal(0, 1, 8, 100)

    def weighed(scores):
        return jnp.sum(
            jnp.where(
                unpack_mask(topk_mask(scores, 10, implementation=implementation), 8), scores * scores, 0
            )
        )

    gradient = quick_jit(jax.grad(weighed))(scores)
    np.testing.assert_allclose(gradient, np.where(selected_by_sorting(scores, 10), 2 * scores, 0))
