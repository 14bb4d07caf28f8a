"""Who sees whom, and who selected whom, in the tests of the kernels; and the softmax over them."""

import numpy as np

from pallas_kernels.visibility import Visibility


def everyone(batch: int, queries: int, keys: int) -> Visibility:
    """Every query sees every key."""
    ones = np.ones((batch, max(queries, keys)), np.int32)
    return Visibility(np.full((batch, queries), keys - 1, np.int32), ones[:, :queries], ones[:, :keys])


def documents(batch: int, queries: int, keys: int) -> Visibility:
    """The last queries of packed documents that end off any block, with padding at the end of the second row."""
    segment = 1 + np.searchsorted([keys // 5, keys // 2, keys // 2 + 7], np.arange(keys), side="right")
    segments = np.broadcast_to(segment, (batch, keys)).astype(np.int32).copy()
    segments[1:, -keys // 4 :] = 0
    index = np.broadcast_to(np.arange(keys - queries, keys, dtype=np.int32), (batch, queries))
    return Visibility(index, segments[:, -queries:], segments)


def packed(mask: np.ndarray) -> np.ndarray:
    """The packed form of a mask [B, T, S], by numpy's own packing of bits."""
    batch, queries, keys = mask.shape
    padded = np.zeros((batch, -(-queries // 32) * 32, keys), bool)
    padded[:, :queries] = mask
    octets = np.packbits(padded.swapaxes(1, 2), axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<u4").swapaxes(1, 2).copy()


def softmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along the last axis, of scores that may all be -inf; and the log-sum-exp."""
    highest = scores.max(-1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = exponentials.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return exponentials / np.where(total > 0, total, 1), (np.log(total) + highest)[..., 0]
