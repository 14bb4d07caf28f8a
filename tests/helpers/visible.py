"""Who sees whom, and who selected whom, in the tests of the kernels."""

import numpy as np

from pallas_kernels.visibility import Visibility


def everyone(batch: int, queries: int, keys: int) -> Visibility:
    """Every query sees every key."""
    ones = np.ones((batch, max(queries, keys)), np.int32)
    return Visibility(np.full((batch, queries), keys - 1, np.int32), ones[:, :queries], ones[:, :keys])


def packed(mask: np.ndarray) -> np.ndarray:
    """The packed form of a mask [B, T, S], by numpy's own packing of bits."""
    batch, queries, keys = mask.shape
    padded = np.zeros((batch, -(-queries // 32) * 32, keys), bool)
    padded[:, :queries] = mask
    octets = np.packbits(padded.swapaxes(1, 2), axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<u4").swapaxes(1, 2).copy()
