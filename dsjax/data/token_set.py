"""Tokenised documents on disk: array_record shards, and how many tokens each document has.

A record is at most ``RECORD_TOKENS`` tokens of one document, uint32, little-endian; a longer document has several, one
after the other. Control tokens around documents are not stored.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int32, Integer

RECORD_TOKENS = 1 << 15
# Tokens do not compress to much less, and one record at a time is what windows read.
_WRITER_OPTIONS = "group_size:1,uncompressed"


class ShardWriter:
    """One shard of documents; ``NAME.array_record`` and ``NAME.lengths.npy`` are there when it is closed."""

    def __init__(self, folder: Path, name: str):
        self._records, self._lengths = folder / f"{name}.array_record", folder / f"{name}.lengths.npy"
        self._file = ArrayRecordWriter(str(_unfinished(self._records)), _WRITER_OPTIONS)
        self._written: list[int] = []

    def append(self, tokens: Int32[np.ndarray, "T"]) -> None:
        """Adds a document."""
        stored = np.asarray(tokens, "<u4")
        for start in range(0, len(stored), RECORD_TOKENS):
            self._file.write(stored[start : start + RECORD_TOKENS].tobytes())
        self._written.append(len(stored))

    def close(self) -> None:
        """Ends the shard."""
        self._file.close()
        with _unfinished(self._lengths).open("wb") as file:
            np.save(file, np.array(self._written, np.uint32))
        os.replace(_unfinished(self._records), self._records)
        os.replace(_unfinished(self._lengths), self._lengths)  # last: where it is, the shard is whole


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


class TokenSet:
    """The documents of several shards, read at random; threads may share it.

    Fields: ``lengths``, tokens of every document.
    """

    def __init__(self, folder: Path, names: list[str]):
        """Errors: OSError or ValueError where a shard is missing or cut short."""
        lengths = [np.load(folder / f"{name}.lengths.npy") for name in names]
        self.lengths: Integer[np.ndarray, "D"] = np.concatenate([np.zeros(0, np.uint32), *lengths])
        records = -(-self.lengths.astype(np.int64) // RECORD_TOKENS)
        self._first_record = np.concatenate([[0], np.cumsum(records)])
        filled = [
            name for name, own in zip(names, lengths, strict=True) if own.any()
        ]  # grain refuses empty files
        self._source: Any = ArrayRecordDataSource([str(folder / f"{name}.array_record") for name in filled])
        if len(self._source) != self._first_record[-1]:
            raise ValueError(f"{len(self._source)} records instead of {self._first_record[-1]} in {folder}")

    def text(self, number: int, start: int, stop: int) -> Int32[np.ndarray, "T"]:
        """Tokens ``start`` to ``stop`` of one document; reads the records that hold them."""
        first, last = start // RECORD_TOKENS, -(-stop // RECORD_TOKENS)
        if start >= stop:
            return np.zeros(0, np.int32)
        wanted = range(int(self._first_record[number]) + first, int(self._first_record[number]) + last)
        stored = np.frombuffer(b"".join(self._source[record] for record in wanted), "<u4")
        return stored[start - first * RECORD_TOKENS : stop - first * RECORD_TOKENS].astype(np.int32)
