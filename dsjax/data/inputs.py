"""Which files there are to read, and how the work on them is divided."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dsjax.config import ConfigError
from dsjax.data.corpus import Skipped, each_once, find_files
from dsjax.data.readers import Part, Reject, compression_of, kind_of

# Bytes of a task: small enough that workers end together, large enough that shards are few.
TASK_BYTES = 32 << 20


def find_parts(inputs: Iterable[str], task_bytes: int = TASK_BYTES) -> tuple[list[Part], list[Reject]]:
    """The parts of all files in ``inputs``, files, folders and globs, in the order of their names; each file once.

    Errors: ConfigError for an input that matches no file.
    """
    skipped: list[Skipped] = []
    found = each_once(find_files(tuple(inputs), skipped))
    parts: list[Part] = []
    rejects = [Reject(item.name, "unreadable", item.reason) for item in skipped]
    for path, name in found:
        if not path.is_file():  # a pipe would be waited for
            rejects.append(Reject(name, "unreadable", "not a regular file"))
            continue
        parts += _parts_of(path, name, task_bytes)
    if not parts:
        raise ConfigError(
            f"--input={','.join(inputs)} has no files that can be read: name text, JSON lines or parquet"
        )
    return parts, rejects


def _parts_of(path: Path, name: str, task_bytes: int) -> Iterator[Part]:
    size = path.stat().st_size
    kind = kind_of(path)
    if kind == "jsonl" and not compression_of(path):
        for start in range(0, max(size, 1), task_bytes):
            yield Part(path, name, start, min(start + task_bytes, size))
    elif kind == "parquet":
        yield from _row_groups(path, name, task_bytes)
    else:
        yield Part(path, name, 0, size)


def _row_groups(path: Path, name: str, task_bytes: int) -> Iterator[Part]:
    """As many as have so many bytes; for a damaged file a part that says so when it is read."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (OSError, pyarrow.ArrowException):
        sizes = []
    start = filled = 0
    for group, size in enumerate(sizes):
        if filled and filled + size > task_bytes:
            yield Part(path, name, start, group)
            start, filled = group, 0
        filled += size
    yield Part(path, name, start, len(sizes))


def divided(parts: Iterable[Part], task_bytes: int = TASK_BYTES) -> list[list[Part]]:
    """Parts that are worked on together, in order: so many bytes, or one part."""
    tasks: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        size = part.stop - part.start if kind_of(part.path) != "parquet" else task_bytes
        if tasks[-1] and filled + size > task_bytes:
            tasks.append([])
            filled = 0
        tasks[-1].append(part)
        filled += size
    return tasks
