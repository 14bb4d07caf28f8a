"""Which tensors a directory of safetensors files holds, and where their bytes lie, from the headers alone.

A file is the length of its header (8 bytes, little-endian), the header in JSON, and the data. No number of a header is
used before it is checked, so a damaged or hostile file costs no more than reading its header.

Source: the safetensors format; ``model.safetensors.index.json`` of the released checkpoints.
"""

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsjax.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_LONGEST_NAME = 500  # characters
_PIECE_BYTES = 256 << 10  # what a core's cache holds
_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
_ITEM_BYTES |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1)
# Of the dtypes of weights, their names in numpy; jax adds those that numpy lacks.
DTYPES = {"F8_E4M3": jnp.float8_e4m3fn, "BF16": jnp.bfloat16, "F32": jnp.float32}
DTYPES = {theirs: np.dtype(ours).name for theirs, ours in DTYPES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it: "F8_E4M3", "BF16", "F32"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name, from the index and all headers.

    Raises CheckpointError where a file is missing, damaged, outside the directory or at odds with the index.
    """
    if not os.path.lexists(directory / INDEX):
        return read_header(_inside(directory, SINGLE))
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, set[str]] = {}
    for name, file in _weight_map(directory / INDEX).items():
        files.setdefault(file, set()).add(name)
    for file, promised in sorted(files.items()):
        found = read_header(_inside(directory, file))
        for name in sorted(promised ^ found.keys()):
            lacks, has = (file, INDEX) if name in promised else (INDEX, file)
            raise CheckpointError(
                f"{directory}: tensor {name} is in {has} but not in {lacks}: download both again"
            )
        tensors |= found
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by their names. Raises CheckpointError where the file is not sound."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > file_bytes - 8:
                raise _damaged(path, f"its header would end past the end of the file ({file_bytes:,} bytes)")
            if header_bytes > _MAX_HEADER_BYTES:
                raise _damaged(
                    path, f"its header has {header_bytes:,} bytes, more than {_MAX_HEADER_BYTES:,}"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    header = _json_object(path, text)
    header.pop("__metadata__", None)
    begin, data_bytes = 8 + header_bytes, file_bytes - 8 - header_bytes
    _check_names(path, header)
    tensors = {name: _tensor(path, name, entry, begin, data_bytes) for name, entry in header.items()}
    _check_gapless(path, tensors, begin, file_bytes)
    return tensors


def read_file(path: Path) -> bytes:
    """A small file. Raises OSError for what is none, too: reading from a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    return path.read_bytes()


def item_bytes(dtype: str) -> int:
    """Of one element of a dtype as safetensors spells it."""
    return _ITEM_BYTES[dtype]


def encoded_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """What a file begins with whose data are ``tensors`` (name, dtype, shape) one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def read_region(tensor: StoredTensor, rows: slice, columns: slice | None = None) -> np.ndarray:
    """Some rows, and some columns of them, of a tensor of weights: the bytes that hold them are read and no others."""
    if columns is not None and columns != slice(0, tensor.shape[1]):
        try:
            mapped = np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.start, tensor.shape)
        except OSError as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise _damaged(tensor.file, "it ends before its last tensor") from None
        return np.array(mapped[rows, columns])
    out = np.empty((rows.stop - rows.start, *tensor.shape[1:]), DTYPES[tensor.dtype])
    with _opened(tensor, rows) as file:
        _fill(file, out.reshape(-1).view(np.uint8), tensor)
    return out


def read_pieces(tensor: StoredTensor, rows: slice) -> Iterator[np.ndarray]:
    """The bytes of some rows, a little at a time in a buffer that is used again: as fast as copying a file."""
    left = (rows.stop - rows.start) * (tensor.size // tensor.shape[0])
    buffer = np.empty(min(left, _PIECE_BYTES), np.uint8)
    with _opened(tensor, rows) as file:
        while left:
            piece = buffer[: min(left, _PIECE_BYTES)]
            _fill(file, piece, tensor)
            yield piece
            left -= piece.size


@contextlib.contextmanager
def _opened(tensor: StoredTensor, rows: slice) -> Iterator[io.FileIO]:
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.start + rows.start * (tensor.size // tensor.shape[0]))
            yield file
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read: {error.strerror}") from None


def _fill(file: io.FileIO, buffer: np.ndarray, tensor: StoredTensor) -> None:
    left = buffer.data
    while left:
        count = file.readinto(left)
        if not count:
            raise _damaged(tensor.file, "it ends before its last tensor")
        left = left[count:]


def _tensor(path: Path, name: str, entry: Any, begin: int, data_bytes: int) -> StoredTensor:
    def natural(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise _damaged(path, f"tensor {name} has no dtype")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name} is {dtype[:20]!r}, which cannot be read here: weights are {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(natural, shape)):
        raise _damaged(path, f"tensor {name} has no shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(natural, offsets)):
        raise _damaged(path, f"tensor {name} has no data_offsets")
    start, stop = offsets
    if not start <= stop <= data_bytes:
        raise _damaged(path, f"tensor {name} ends at byte {stop:,} of {data_bytes:,} bytes of data")
    if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _damaged(path, f"tensor {name} has {stop - start:,} bytes, not those of its shape and dtype")
    return StoredTensor(path, dtype, tuple(shape), begin + start, stop - start)


def _check_gapless(path: Path, tensors: dict[str, StoredTensor], begin: int, end: int) -> None:
    """Every byte of the data belongs to one tensor."""
    reached = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != reached:
            raise _damaged(
                path, f"tensor {name} {'overlaps' if tensor.start < reached else 'leaves a gap to'} another"
            )
        reached += tensor.size
    if reached != end:
        raise _damaged(path, f"{end - reached:,} bytes at its end belong to no tensor")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = _json_object(path, read_file(path)).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise _damaged(path, "it has no weight_map from tensors to files")
    _check_names(path, found)
    return found


def _check_names(path: Path, names: Iterable[str]) -> None:
    """They go to the terminal and into other files."""
    for name in names:
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise _damaged(path, f"{name[:80]!a} is no name of a tensor")


def _inside(directory: Path, file: str) -> Path:
    """The file if it really lies in the directory."""
    path = directory / file
    if "/" in file or "\\" in file or "\0" in file or file in ("", ".", ".."):
        raise CheckpointError(
            f"{directory / INDEX} names the file {file!r}: files must lie in the directory itself"
        )
    real = directory.resolve()
    allowed = {real}
    if (
        real.parent.name == "snapshots"
    ):  # the cache of huggingface_hub: files are links into a folder beside it
        allowed.add(real.parents[1] / "blobs")
    try:
        resolved, is_file = path.resolve(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that cannot be one, a link to itself
        raise CheckpointError(
            f"{directory / INDEX} names the file {file!r}, which cannot be one ({error})"
        ) from None
    if resolved.parent not in allowed:
        raise CheckpointError(
            f"{path} is a link to {resolved}: name the directory that holds the files themselves"
        )
    if not is_file:
        raise CheckpointError(f"{path} is missing: download it, or name the directory that has it")
    return path


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands in it twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its JSON cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(path, "its JSON is not an object")
    return value


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}; download or make it again")
