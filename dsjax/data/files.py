"""Files that are there whole or not at all, and their hashes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file has its own, and is on the disk, when the block ends well."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value; what JSON does not know stands there as text."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def hash_of_files(paths: Sequence[Path]) -> str:
    """blake2b, 32 hexadecimal digits, of their contents one after another."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()
