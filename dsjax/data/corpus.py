"""Text files on disk as documents: found, checked once, and read again piece by piece."""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dsjax.config import ConfigError

# Memory and the tokenizer see a long file in pieces of about this size, each ended by a line break.
PIECE_BYTES = 1 << 18

# Folders of the standard library that hold tests, other people's packages or compiled files.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One text of the corpus: a file, or the part of one between two byte positions."""

    path: Path
    name: str  # what reports and the fingerprint call it
    digest: bytes  # blake2b, 16 bytes, of the whole file
    stamp: tuple[int, int]  # the file's size and modification time when it was checked
    start: int  # bytes
    stop: int

    @property
    def size_bytes(self) -> int:
        """Length of the text in bytes of UTF-8."""
        return self.stop - self.start

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, open for reading; ConfigError if it is no longer what was checked."""
        try:
            with self.path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise OSError("it is not the file that was checked")
                yield file
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.paths: {self.name} changed while the text was being prepared ({error}): "
                "start again when it stays still"
            ) from error

    def pieces(self) -> Iterator[str]:
        """The text in order, in pieces of about ``PIECE_BYTES`` that end with a line where there is one."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        left = self.size_bytes
        with self.opened() as file:
            file.seek(self.start)
            while left:
                block = file.read(min(left, PIECE_BYTES))
                block += file.readline(min(left - len(block), PIECE_BYTES))
                if not block:
                    raise OSError("it is shorter than when it was checked")
                left -= len(block)
                yield decoder.decode(block, final=not left)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file or folder that was found and not read, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Every document that was found, ordered by name, and everything that was not usable."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]

    @property
    def size_bytes(self) -> int:
        """Length of all documents in bytes of UTF-8."""
        return sum(document.size_bytes for document in self.documents)

    @property
    def fingerprint(self) -> str:
        """Hash, 32 hexadecimal digits, of the sorted names and contents."""
        whole = hashlib.blake2b(digest_size=16)
        for name, digest in sorted((document.name, document.digest) for document in self.documents):
            whole.update(name.encode() + b"\0" + digest)
        return whole.hexdigest()


def read_corpus(paths: tuple[str, ...]) -> Corpus:
    """Finds and checks the documents of ``data.paths``: files, folders and globs of UTF-8 text.

    Folders are searched to the bottom; what is hidden in them is left out. Without paths the documents are
    the library sources of the running Python. What is empty, unreadable or not UTF-8 is skipped and listed.

    Errors: ConfigError for a path that matches no file, and where no document is left.
    """
    skipped: list[Skipped] = []
    documents: list[Document] = []
    for path, name in each_once(find_files(paths, skipped) if paths else _library_sources(skipped)):
        checked = _check(path, name)
        if isinstance(checked, Document):
            documents.append(checked)
        else:
            skipped.append(checked)
    if not documents:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in skipped[:3])
        raise ConfigError(f"data.paths={paths} has no usable text ({reasons}): it must be UTF-8 files")
    return Corpus(tuple(documents), tuple(skipped))


def each_once(files: Iterable[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Files with their names, in the order of these, and each once however often it was found."""
    found: dict[str, tuple[Path, str]] = {}
    for path, name in files:
        found.setdefault(os.path.realpath(path), (path, name))
    return sorted(found.values(), key=lambda item: item[1])


def find_files(paths: tuple[str, ...], skipped: list[Skipped]) -> Iterator[tuple[Path, str]]:
    """Files, those in folders and those that match globs, each with its printable name; hidden ones are left out.

    Errors: ConfigError for a path that matches no file.
    """
    for pattern in paths:
        expanded = os.path.expanduser(pattern)
        exists = os.path.lexists(expanded)
        matches = [expanded] if exists else sorted(glob.glob(expanded, recursive=True))
        count_before, any_file = len(skipped), False
        for match in map(Path, matches):
            for path in _walk(match, frozenset(), skipped) if match.is_dir() else [match]:
                any_file = True
                yield path, _printable(path)
        if not any_file and len(skipped) == count_before:
            raise ConfigError(
                f"data.paths: {pattern!r} matches no file: give files, folders or globs of UTF-8 text"
            )


def _library_sources(skipped: list[Skipped]) -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in _walk(root, _NOT_LIBRARY, skipped) if path.suffix == ".py"]
    if not sources:
        raise ConfigError(
            "data.paths is empty and this Python keeps no library sources: name some text files"
        )
    for path in sources:
        yield path, _printable(path.relative_to(root))


def _walk(root: Path, left_out: frozenset[str], skipped: list[Skipped]) -> Iterator[Path]:
    """The files under ``root``, hidden ones and the folders named in ``left_out`` excepted."""

    def note(error: OSError) -> None:
        skipped.append(Skipped(_printable(Path(error.filename)), f"unreadable: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in files:
            if not name.startswith("."):
                yield Path(folder, name)


def _check(path: Path, name: str) -> Document | Skipped:
    """Reads a file once from end to end: its hash and size, or the reason why it is of no use."""
    digest = hashlib.blake2b(digest_size=16)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        # Asked before opening, which would wait for ever on a pipe.
        if not stat.S_ISREG(path.stat().st_mode):
            return Skipped(name, "not a regular file")
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            while block := file.read(PIECE_BYTES):
                digest.update(block)
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return Skipped(name, f"not UTF-8: {error.reason}")
    except OSError as error:
        return Skipped(name, f"unreadable: {error.strerror}")
    if not stamp[0]:
        return Skipped(name, "empty")
    return Document(path, name, digest.digest(), stamp, 0, stamp[0])


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _printable(path: Path) -> str:
    """A file name may be any bytes: what is not UTF-8 in it is written as escapes."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
