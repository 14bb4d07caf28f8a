"""Reading tokenised documents at random from the shards that ``shards.py`` writes."""

from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int32, Integer

from dsjax.config import ConfigError
from dsjax.data.shards import RECORD_TOKENS, shard_files


class TokenSet:
    """The documents of several shards, read at random; threads may share it.

    Fields: ``lengths``, tokens of every document.
    """

    def __init__(self, folder: Path, names: list[str]):
        """Errors: OSError or ValueError where a shard is missing or cut short."""
        self._folder = folder
        lengths = [np.load(shard_files(folder, name)[1]) for name in names]
        self.lengths: Integer[np.ndarray, "D"] = np.concatenate([np.zeros(0, np.uint32), *lengths])
        records = -(-self.lengths.astype(np.int64) // RECORD_TOKENS)
        self._first_record = np.concatenate([[0], np.cumsum(records)])
        filled = [
            name for name, own in zip(names, lengths, strict=True) if own.any()
        ]  # grain refuses empty files
        self._source: Any = ArrayRecordDataSource([str(shard_files(folder, name)[0]) for name in filled])
        if len(self._source) != self._first_record[-1]:
            raise ValueError(f"{len(self._source)} records instead of {self._first_record[-1]} in {folder}")

    def text(self, number: int, start: int, stop: int) -> Int32[np.ndarray, "T"]:
        """Tokens ``start`` to ``stop`` of one document; reads the records that hold them.

        Errors: ConfigError where they are damaged.
        """
        first, last = start // RECORD_TOKENS, -(-stop // RECORD_TOKENS)
        if start >= stop:
            return np.zeros(0, np.int32)
        wanted = range(int(self._first_record[number]) + first, int(self._first_record[number]) + last)
        try:
            stored = np.frombuffer(b"".join(self._source[record] for record in wanted), "<u4")
            if len(stored) < min(last * RECORD_TOKENS, int(self.lengths[number])) - first * RECORD_TOKENS:
                raise ValueError("records are shorter than the lengths of documents")
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{self._folder} is damaged ({error}): delete it and prepare it again"
            ) from error
        return stored[start - first * RECORD_TOKENS : stop - first * RECORD_TOKENS].astype(np.int32)
