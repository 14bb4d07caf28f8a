"""Who may see whom, against the rule in words."""

import numpy as np

from pallas_kernels.visibility import Visibility

SEGMENTS = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [5, 5, 5, 5, 0, 0, 0, 0]], np.int32)


def may_see(query_index, query_segment, key_index, key_segment) -> bool:
    return key_index <= query_index and query_segment == key_segment and query_segment != 0


def check(query_index: np.ndarray, query_segment: np.ndarray, visibility: Visibility, keys: int) -> None:
    mask = np.asarray(visibility.mask())
    assert mask.shape == (*query_index.shape, keys)
    for b, t, s in np.ndindex(mask.shape):
        expected = may_see(query_index[b, t], query_segment[b, t], s, SEGMENTS[b, s])
        assert mask[b, t, s] == expected, (b, t, s)


def test_a_sequence_and_itself():
    index = np.broadcast_to(np.arange(8, dtype=np.int32), SEGMENTS.shape)
    check(index, SEGMENTS, Visibility(index, SEGMENTS, SEGMENTS), 8)


def test_a_block_of_queries():
    """Queries that stand anywhere, one of them padding and one in a segment that has no keys."""
    index, segment = np.array([[2, 4, 5], [3, 1, 7]], np.int32), np.array([[2, 2, 9], [5, 5, 0]], np.int32)
    check(index, segment, Visibility(index, segment, SEGMENTS), 8)
