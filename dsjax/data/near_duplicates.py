"""Documents that nearly repeat an earlier one: MinHash signatures, candidates by LSH, and a last look at each.

Two documents are as alike as the Jaccard index of their sets of five words in a row. Source: Broder 1997; datasketch.
"""

import re
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from jaxtyping import UInt32

_WORDS = re.compile(r"\w+|[^\w\s]")
_SHINGLE_WORDS = 5
_HASHES = 256
_BANDS, _ROWS = 32, 8  # a pair as alike as 0.8 is a candidate with 99.7 %, one of 0.5 with 12 %
# An estimate from 256 hashes is off by 0.025 (one sigma) at 0.8: of such pairs, this keeps apart one in ten thousand.
THRESHOLD = 0.7
_HASHING = MinHash(num_perm=_HASHES, seed=1, hashfunc=zlib.crc32)


def signature(text: str) -> UInt32[np.ndarray, "256"]:
    """What is kept of a document to compare it: the least of each of 256 hashes of its shingles."""
    words = _WORDS.findall(text)
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    shingles = {" ".join(words[first : first + _SHINGLE_WORDS]) for first in range(count)}
    made = _HASHING.copy()
    made.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return made.hashvalues.astype(np.uint32)


def repeats(signatures: Iterable[UInt32[np.ndarray, "256"]], threshold: float = THRESHOLD) -> list[int]:
    """For each document in order the number of an earlier one that it nearly repeats and that repeats none, or -1."""
    found: list[int] = []
    first_ones = MinHashLSH(num_perm=_HASHES, params=(_BANDS, _ROWS))
    kept: dict[int, UInt32[np.ndarray, "256"]] = {}
    for number, own in enumerate(signatures):
        made = _HASHING.copy()
        made.hashvalues = np.asarray(own, made.hashvalues.dtype)
        candidates: list[Any] = first_ones.query(made)
        near = [other for other in candidates if np.mean(kept[other] == own) >= threshold]
        found.append(min(near, default=-1))
        if not near:
            first_ones.insert(number, made)
            kept[number] = own
    return found
