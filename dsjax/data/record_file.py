"""Writing array_record files, which are there whole or not at all."""

import os
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

# Tokens do not compress to much less, and one record at a time is what windows read.
_OPTIONS = "group_size:1,uncompressed"


class RecordFile:
    """A file of records; it has its name once it is closed."""

    def __init__(self, path: Path):
        self._path, self._unfinished = path, path.with_name(f"{path.name}.unfinished")
        self._file = ArrayRecordWriter(str(self._unfinished), _OPTIONS)

    def write(self, record: bytes) -> None:
        """Adds a record. Errors: OSError."""
        try:
            self._file.write(record)
        except RuntimeError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Ends the file. Errors: OSError."""
        try:
            self._file.close()
        except RuntimeError as error:
            raise self._failed(error) from error
        os.replace(self._unfinished, self._path)

    def _failed(self, error: RuntimeError) -> OSError:
        """The library tells what it was doing as well, and what else failed by that."""
        return OSError(0, str(error).partition(";")[0], str(self._path))
