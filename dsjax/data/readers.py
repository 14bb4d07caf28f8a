"""Files of text, JSON lines and parquet, compressed or not, as documents; what cannot be read is named and passed over.

Memory is that of the longest document that is let through, or of a page of parquet, whatever the files hold.
"""

import bz2
import contextlib
import gzip
import importlib
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dsjax.config import ConfigError

_COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_JSON_LINES = (".jsonl", ".ndjson")
_ROWS_BYTES = 4 << 20  # of parquet rows that are read at a time
_DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)  # what decompressing raises


class Part(NamedTuple):
    """What is read at a time: a file, some bytes of one in plain JSON lines, or some row groups of one in parquet."""

    path: Path
    name: str  # what reports call the file
    start: int
    stop: int
    size_bytes: int = 0  # its share of the work
    stamp: tuple[int, int] | None = None  # size and modification time of the file that was found


class Text(NamedTuple):
    """A document."""

    name: str
    text: str


class Reject(NamedTuple):
    """What is no document, and why; the reason is one of a few words that can be counted."""

    name: str
    reason: str
    sample: str = ""


def needed(module: str, purpose: str) -> Any:
    """A library of the extra ``[data]``; ConfigError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{purpose} needs {error.name}, which is not installed: pip install -e '.[data]', or '.[ray]' for Ray"
        ) from None


def kind_of(path: Path) -> str:
    """``text``, ``jsonl`` or ``parquet``, by the ending of the name."""
    suffix = path.with_suffix("").suffix if compression_of(path) else path.suffix
    if suffix.lower() in _JSON_LINES:
        return "jsonl"
    return "parquet" if suffix.lower() == ".parquet" else "text"


def compression_of(path: Path) -> str:
    """Its ending, or nothing."""
    ending = path.suffix.lower()
    return ending if ending in (*_COMPRESSED, ".zst") else ""


def read(part: Part, *, text_field: str, most_bytes: int) -> Iterator[Text | Reject]:
    """The documents of a part in order, each at most ``most_bytes`` long in UTF-8."""
    kind = kind_of(part.path)
    try:
        if kind == "parquet":
            yield from _parquet(part, text_field, most_bytes)
            return
        with _opened(part.path) as file:
            if kind == "jsonl":
                yield from _json_lines(file, part, text_field, most_bytes)
            else:
                yield from _texts(file, part, most_bytes)
    except _DAMAGED as error:
        reason = "unreadable" if isinstance(error, OSError) and error.errno else "damaged"
        yield Reject(part.name, reason, str(error)[:200])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    ending = compression_of(path)
    if ending == ".zst":
        pyarrow = needed("pyarrow", str(path))
        # Of the libraries that read it, this one says where an archive was cut.
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as stream:
            yield io.BufferedReader(stream)
        return
    with _COMPRESSED.get(ending, open)(path, "rb") as file:
        yield file


def _texts(file: IO[bytes], part: Part, most_bytes: int) -> Iterator[Text | Reject]:
    """The file as a document; a longer one is several, cut where lines end."""
    content = file.read(most_bytes + 1)
    if len(content) <= most_bytes:
        yield _decoded(content, part.name, "utf-8-sig")
        return
    position = 0
    while content:
        size = content.rfind(b"\n", 0, most_bytes) + 1 if len(content) > most_bytes else len(content)
        name = f"{part.name}:{position}"
        if size:
            yield _decoded(content[:size], name, "utf-8" if position else "utf-8-sig")
            content = content[size:]
        else:
            size = len(content) + (0 if content.endswith(b"\n") else _skip_line(file))
            yield Reject(name, "too long")
            content = b""
        position += size
        content += file.read(most_bytes + 1 - len(content))


def _decoded(content: bytes, name: str, encoding: str) -> Text | Reject:
    try:
        return Text(name, content.decode(encoding))
    except UnicodeDecodeError as error:
        return Reject(name, "not UTF-8", repr(content[max(error.start - 40, 0) : error.start + 40]))


def _json_lines(file: IO[bytes], part: Part, text_field: str, most_bytes: int) -> Iterator[Text | Reject]:
    """Lines that begin within the part; a line may be a little longer than its text."""
    longest = 2 * most_bytes + 65536
    position = 0
    if part.start:  # the line around the part's first byte belongs to the part before
        file.seek(part.start - 1)
        position = part.start - 1 + _skip_line(file)
    stop = math.inf if compression_of(part.path) else part.stop
    while position < stop:
        begin = position
        line = file.readline(longest)
        if not line:
            return
        position += len(line)
        name = f"{part.name}:{begin}"
        if len(line) == longest and not line.endswith(b"\n"):
            position += _skip_line(file)
            yield Reject(name, "too long")
        elif line.strip():
            yield _json_text(line, name, text_field, most_bytes)


def _skip_line(file: IO[bytes]) -> int:
    """Reads to the end of a line, a little at a time; how many bytes that was."""
    skipped = 0
    while block := file.readline(1 << 20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def _json_text(line: bytes, name: str, text_field: str, most_bytes: int) -> Text | Reject:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Reject(name, "not UTF-8", repr(line[:80]))
    except (ValueError, RecursionError):
        return Reject(name, "not JSON", line[:80].decode(errors="replace"))
    found = record.get(text_field) if isinstance(record, dict) else None
    return _checked(found, name, text_field, most_bytes)


def _checked(found: object, name: str, text_field: str, most_bytes: int) -> Text | Reject:
    """A field's value as a document, if it is one."""
    if not isinstance(found, str):
        return Reject(name, f"no text in field {text_field!r}", repr(found)[:80])
    try:
        size = len(found.encode())
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return Reject(name, "not UTF-8", repr(found[:80]))
    return Reject(name, "too long") if size > most_bytes else Text(name, found)


def _row_text(value: Any, name: str, text_field: str, most_bytes: int) -> Text | Reject:
    try:
        found = value.as_py()
    except UnicodeDecodeError as error:
        return Reject(name, "not UTF-8", repr(error.object[:80]))
    return _checked(found, name, text_field, most_bytes)


def _parquet(part: Part, text_field: str, most_bytes: int) -> Iterator[Text | Reject]:
    pyarrow, parquet = needed("pyarrow", part.name), needed("pyarrow.parquet", part.name)
    try:
        with parquet.ParquetFile(part.path) as file:
            if text_field not in file.schema_arrow.names:
                yield Reject(
                    part.name, f"no text in field {text_field!r}", ", ".join(file.schema_arrow.names)[:200]
                )
                return
            for group in range(part.start, part.stop):
                about = file.metadata.row_group(group)
                row_bytes = about.total_byte_size // max(about.num_rows, 1)
                rows = max(1, min(64, _ROWS_BYTES // max(row_bytes, 1)))
                row = 0
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[text_field]):
                    for value in batch.column(0):
                        yield _row_text(value, f"{part.name}:{group}:{row}", text_field, most_bytes)
                        row += 1
    except pyarrow.ArrowException as error:
        yield Reject(part.name, "damaged", str(error)[:200])
