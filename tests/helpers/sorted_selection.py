"""What is to be selected, by a sort; and the check of an implementation against it."""

import numpy as np
from numerics import quick_jit
from visible import packed

from pallas_kernels.topk.api import topk_indices, topk_mask

mask_of = quick_jit(topk_mask, static_argnames=("k", "implementation"))
indices_of = quick_jit(topk_indices, static_argnames=("k", "implementation"))


def selected_by_sorting(scores: np.ndarray, k: int) -> np.ndarray:
    """Row by row. numpy's stable sort keeps equal scores, and 0.0 and -0.0 are equal, in order of index."""
    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        places = np.flatnonzero(scores[row] > -np.inf)
        best = places[np.argsort(-scores[row][places].astype(np.float64), kind="stable")[:k]]
        mask[row][best] = True
    return mask


def check_selection(implementation: str, scores: np.ndarray, k: int) -> None:
    """Both forms, of scores [B, T, S] that are -inf where there is no key."""
    expected = selected_by_sorting(scores, k)
    np.testing.assert_array_equal(mask_of(scores, k, implementation=implementation), packed(expected))
    indices = np.asarray(indices_of(scores, k, implementation=implementation))
    assert indices.dtype == np.int32
    assert indices.shape == (*scores.shape[:-1], k)
    for row in np.ndindex(scores.shape[:-1]):
        chosen = np.flatnonzero(expected[row])
        np.testing.assert_array_equal(indices[row], np.pad(chosen, (0, k - chosen.size), constant_values=-1))
