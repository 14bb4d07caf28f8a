"""Writing tokenised documents: array_record shards, and how many tokens each document has.

A record is at most ``RECORD_TOKENS`` tokens of one document, uint32, little-endian; a longer document has several, one
after the other. Control tokens around documents are not stored.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dsjax.data.files import whole_file
from dsjax.data.record_file import RecordFile

RECORD_TOKENS = 1 << 15


def shard_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The records of a shard, and the lengths of its documents."""
    return folder / f"{name}.array_record", folder / f"{name}.lengths.npy"


class ShardWriter:
    """One shard of documents; ``NAME.array_record`` and ``NAME.lengths.npy`` are there when it is closed."""

    def __init__(self, folder: Path, name: str):
        records, self._lengths = shard_files(folder, name)
        self._file = RecordFile(records)
        self._written: list[int] = []

    def append(self, tokens: Int32[np.ndarray, "T"]) -> None:
        """Adds a document. Errors: OSError."""
        stored = np.asarray(tokens, "<u4")
        for start in range(0, len(stored), RECORD_TOKENS):
            self._file.write(stored[start : start + RECORD_TOKENS].tobytes())
        self._written.append(len(stored))

    def close(self) -> None:
        """Ends the shard. Errors: OSError."""
        self._file.close()
        with whole_file(self._lengths) as unfinished, unfinished.open("wb") as file:
            np.save(file, np.array(self._written, np.uint32))
