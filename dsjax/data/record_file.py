"""Writing array_record files, which are there whole or not at all."""

import contextlib
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from dsjax.data.files import whole_file

# Tokens do not compress to much less, and one record at a time is what windows read.
_OPTIONS = "group_size:1,uncompressed"


class RecordFile:
    """A file of records; it has its name once it is closed."""

    def __init__(self, path: Path):
        self._path = path
        self._whole = contextlib.ExitStack()
        unfinished = self._whole.enter_context(whole_file(path))
        self._file = ArrayRecordWriter(str(unfinished), _OPTIONS)

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
        self._whole.close()

    def _failed(self, error: RuntimeError) -> OSError:
        """The library tells what it was doing as well, and what else failed by that."""
        return OSError(0, str(error).partition(";")[0], str(self._path))
