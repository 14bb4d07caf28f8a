"""What the union of neighbouring queries costs, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from visible import packed

from pallas_kernels.platform import UnsupportedError
from pallas_kernels.sparse_mla.union_share import union_share


def by_loop(mask: np.ndarray) -> tuple[float, float]:
    unions, wanted = [], []
    for rows in mask:
        for first in range(0, len(rows), 32):
            unions.append(len(set(np.nonzero(rows[first : first + 32])[1])))
        wanted += [np.count_nonzero(row) for row in rows]
    return np.mean(unions) / np.mean(wanted), 1 - sum(wanted) / (32 * sum(unions))


def listed(mask: np.ndarray, places: int) -> np.ndarray:
    """Keys in no order, -1 anywhere."""
    indices = np.full((*mask.shape[:2], places), -1, np.int32)
    for b, t in np.ndindex(mask.shape[:2]):
        chosen = np.flatnonzero(mask[b, t])
        indices[b, t, : chosen.size] = chosen
    return np.random.RandomState(1).permutation(indices.swapaxes(0, 2)).swapaxes(0, 2)


def both_forms(mask: np.ndarray) -> list[tuple[float, float]]:
    forms = packed(mask), listed(mask, mask.sum(-1).max() + 3)
    shares = [jax.jit(union_share, static_argnums=1)(form, mask.shape[1]) for form in forms]
    return [(float(share.growth), float(share.unwanted)) for share in shares]


@pytest.mark.parametrize("queries", [1, 32, 70])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_random_selections(queries, density):
    """Blocks that are not full, key 0 among the selected, rows and a whole block without any."""
    mask = np.random.RandomState(queries).uniform(size=(2, queries, 300)) < density
    mask[0, :, 0] = True
    mask[1, 20:] = False
    for share in both_forms(mask):
        np.testing.assert_allclose(share, by_loop(mask), rtol=1e-6)


def test_queries_that_agree_and_queries_that_do_not():
    agree = np.broadcast_to(np.arange(200) % 3 == 0, (1, 64, 200))
    for share in both_forms(agree):
        np.testing.assert_allclose(share, (1, 0), atol=1e-6)
    alone = (np.arange(320) // 5 == np.arange(64)[:, None])[None]
    for share in both_forms(alone):
        np.testing.assert_allclose(share, (32, 31 / 32), rtol=1e-6)


def test_a_selection_of_nothing():
    assert both_forms(np.zeros((2, 40, 50), bool)) == [(1, 0)] * 2


def test_what_is_no_selection_is_refused():
    with pytest.raises(
        UnsupportedError, match=r"union_share: selection is float32\[2, 40, 50\], and it should be"
    ):
        union_share(jnp.zeros((2, 40, 50)), 40)
    with pytest.raises(UnsupportedError, match=r"union_share.*for 70 queries.*given uint32\[2, 2, 50\]"):
        union_share(jnp.zeros((2, 2, 50), jnp.uint32), 70)
    with pytest.raises(UnsupportedError, match=r"union_share: selection is int32\[2, 40, 5\].* 41 queries"):
        union_share(jnp.zeros((2, 40, 5), jnp.int32), 41)
