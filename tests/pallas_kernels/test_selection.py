"""The packed form of a selection."""

import numpy as np
import pytest
from visible import packed

from pallas_kernels.selection import pack_mask, unpack_mask


@pytest.mark.parametrize("queries", [1, 31, 32, 33, 100])
def test_a_bit_for_every_query(queries):
    mask = np.random.RandomState(queries).uniform(size=(2, queries, 45)) < 0.4
    words = np.asarray(pack_mask(mask))
    np.testing.assert_array_equal(words, packed(mask))
    for b, t, s in np.ndindex(mask.shape):
        assert (int(words[b, t // 32, s]) >> (t % 32)) & 1 == mask[b, t, s]
    np.testing.assert_array_equal(unpack_mask(words, queries), mask)
