"""Writing tokenised documents: array_record shards, and how many tokens each document has.

A record is at most ``RECORD_TOKENS`` tokens of one document, uint32, little-endian; a longer document has several, one
after the other. Control tokens around documents are not stored.
"""

import os
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int32

RECORD_TOKENS = 1 << 15
# Tokens do not compress to much less, and one record at a time is what windows read.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def shard_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The records of a shard, and the lengths of its documents."""
    return folder / f"{name}.array_record", folder / f"{name}.lengths.npy"


class ShardWriter:
    """One shard of documents; ``NAME.array_record`` and ``NAME.lengths.npy`` are there when it is closed."""

    def __init__(self, folder: Path, name: str):
        self._records, self._lengths = shard_files(folder, name)
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
