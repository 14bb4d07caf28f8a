"""Which files there are to read, and how the work on them is divided, whatever does it."""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsjax.config import ConfigError
from dsjax.data.readers import Part, Reject, compression_of, kind_of, needed

# Bytes of a task: so many tasks that workers end together, of so many bytes that shards are not too many.
_TASKS = 64
_LEAST_TASK_BYTES, _MOST_TASK_BYTES = 1 << 20, 256 << 20

# Folders of the standard library that hold tests or other people's packages.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def find_tasks(
    inputs: tuple[str, ...], called: str, output: Path | None = None
) -> tuple[list[list[Part]], list[Reject]]:
    """What is read together, in the order of the names of the files, each file once; and what cannot be read.

    ``inputs`` are files, folders and globs; without any, the library sources of the running Python. Folders are
    searched to the bottom; what is hidden in them is left out, and what stands in ``output``.

    Errors: ConfigError, which calls the inputs ``called``, for one that matches no file, and where nothing is left.
    """
    rejects: list[Reject] = []
    every = _find_files(inputs, called, rejects) if inputs else _library_sources(called, rejects)
    found = _each_once(every, output)
    files = [(path, name, status) for path, name in found if (status := _status(path, name, rejects))]
    total = sum(status.st_size for _, _, status in files)
    task_bytes = min(max(total // _TASKS, _LEAST_TASK_BYTES), _MOST_TASK_BYTES)
    parts = [part for file in files for part in _parts_of(*file, task_bytes)]
    if not parts:
        reasons = "; ".join(f"{item.name}: {item.sample}" for item in rejects[:3])
        raise ConfigError(
            f"{called}={','.join(inputs)} has no file that can be read ({reasons or 'it is empty'})"
        )
    return list(_divided(parts, task_bytes)), rejects


def _each_once(files: Iterable[tuple[Path, str]], without: Path | None) -> list[tuple[Path, str]]:
    """Files with their names, in the order of these, and each once however often it was found; none in ``without``.

    Of several names of a file one that ends in a kind counts: caches keep files under names that are hashes.
    """
    found: dict[str, tuple[Path, str]] = {}
    left_out = os.path.join(os.path.realpath(without), "") if without else "\0"
    for path, name in sorted(files, key=lambda item: (not item[0].suffix, item[1])):
        real = os.path.realpath(path)
        if not real.startswith(left_out):
            found.setdefault(real, (path, name))
    return sorted(found.values(), key=lambda item: item[1])


def _find_files(inputs: tuple[str, ...], called: str, rejects: list[Reject]) -> Iterator[tuple[Path, str]]:
    """Each file with its printable name."""
    for pattern in inputs:
        expanded = os.path.expanduser(pattern)
        matches = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
        count_before, any_file = len(rejects), False
        for match in map(Path, matches):
            for path in _walk(match, frozenset(), rejects) if match.is_dir() else [match]:
                any_file = True
                yield path, _printable(path)
        if not any_file and len(rejects) == count_before:
            raise ConfigError(f"{called}: {pattern!r} matches no file: give files, folders or globs")


def _library_sources(called: str, rejects: list[Reject]) -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in _walk(root, _NOT_LIBRARY, rejects) if path.suffix == ".py"]
    if not sources:
        raise ConfigError(f"{called} is empty and this Python keeps no library sources: name some text files")
    for path in sources:
        yield path, _printable(path.relative_to(root))


def _walk(root: Path, left_out: frozenset[str], rejects: list[Reject]) -> Iterator[Path]:
    """The files under ``root``; what is hidden or compiled, and the folders named in ``left_out``, excepted."""

    def note(error: OSError) -> None:
        rejects.append(Reject(_printable(Path(error.filename)), "unreadable", str(error.strerror)))

    seen: set[str] = set()  # links may lead in circles
    for folder, folders, files in os.walk(root, onerror=note, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        wanted = (n for n in folders if not n.startswith(".") and n != "__pycache__" and n not in left_out)
        folders[:] = sorted(wanted)
        for name in files:
            if not name.startswith("."):
                yield Path(folder, name)


def _printable(path: Path) -> str:
    """A file name may be any bytes: what is not UTF-8 in it is written as escapes."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _status(path: Path, name: str, rejects: list[Reject]) -> os.stat_result | None:
    try:
        status = path.stat()
    except OSError as error:
        rejects.append(Reject(name, "unreadable", str(error.strerror)))
        return None
    if stat.S_ISREG(status.st_mode):
        return status
    rejects.append(Reject(name, "unreadable", "not a regular file"))  # a pipe would be waited for
    return None


def _parts_of(path: Path, name: str, status: os.stat_result, task_bytes: int) -> Iterator[Part]:
    size, stamp = status.st_size, (status.st_size, status.st_mtime_ns)
    kind = kind_of(path)
    if kind == "jsonl" and not compression_of(path):
        for start in range(0, max(size, 1), task_bytes):
            stop = min(start + task_bytes, size)
            yield Part(path, name, start, stop, stop - start, stamp)
    elif kind == "parquet":
        for start, stop, group_bytes in _row_groups(path, task_bytes):
            yield Part(path, name, start, stop, group_bytes, stamp)
    else:
        yield Part(path, name, 0, size, size, stamp)


def _row_groups(path: Path, task_bytes: int) -> Iterator[tuple[int, int, int]]:
    """As many as have so many bytes, with these; for a damaged file a part that says so when it is read."""
    pyarrow, parquet = needed("pyarrow", str(path)), needed("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (OSError, pyarrow.ArrowException):
        sizes = []
    start = filled = 0
    for group, size in enumerate(sizes):
        if filled and filled + size > task_bytes:
            yield start, group, filled
            start, filled = group, 0
        filled += size
    yield start, len(sizes), filled


def _divided(parts: Iterable[Part], task_bytes: int) -> Iterator[list[Part]]:
    """In order, at most so many bytes together, or one part."""
    task: list[Part] = []
    filled = 0
    for part in parts:
        if task and filled + part.size_bytes > task_bytes:
            yield task
            task, filled = [], 0
        task.append(part)
        filled += part.size_bytes
    yield task
