"""Orbax checkpoints written and read in pieces: arrays larger than memory, a chunk at a time.

What is written here is an ordinary orbax checkpoint of uncompressed zarr arrays, in which every chunk is a file of the
bytes themselves.
"""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_names import CheckpointTensor
from dsjax.checkpoint.safetensors_files import DTYPES, StoredTensor
from dsjax.checkpoint.stacked import StackedArray, chunk_key
from dsjax.precision.block_scales import BLOCK

_CACHE_BYTES = 1 << 30  # of decoded chunks, for arrays whose chunks are larger than what is read at once


class ArraySpec(NamedTuple):
    """An array to be written."""

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    order: tuple[int, ...]  # of the axes in a chunk's bytes


def create_checkpoint(folder: Path, arrays: dict[str, ArraySpec]) -> None:
    """An orbax checkpoint, item ``state``, with every array there and no chunk written. Made whole or not at all.

    Raises CheckpointError where it cannot be written.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)
        _create_skeleton(unfinished, arrays)
        for name, spec in arrays.items():
            _create(unfinished / "state" / name, spec)
        unfinished.rename(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    except ValueError as error:  # of TensorStore, which repeats what the system said
        raise write_error(folder, _system_error(str(error))) from error


def _create_skeleton(unfinished: Path, arrays: dict[str, ArraySpec]) -> None:
    """What makes the folder a checkpoint: orbax writes it, for arrays of one element, elsewhere.

    Where a disk is full its threads go on complaining after it has ended.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_zarr3, saving.array_metadata_store = False, True, None
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "0"
        with context:
            ones = {
                name: jax.device_put(np.zeros((1,) * len(spec.shape), spec.dtype))
                for name, spec in arrays.items()
            }
            ocp.save_checkpointables(str(made), {"state": ones})
        for name in arrays:
            shutil.rmtree(made / "state" / name)
        for path in made.rglob("*"):
            if path.is_file():
                copy = unfinished / path.relative_to(made)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def _system_error(text: str) -> OSError:
    found = next((code for code in errno.errorcode if os.strerror(code) in text), None)
    return OSError(found, os.strerror(found) if found else text.splitlines()[0])


def _create(folder: Path, spec: ArraySpec) -> None:
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if spec.order != tuple(sorted(spec.order)):
        codecs.insert(0, {"name": "transpose", "configuration": {"order": spec.order}})
    grid = {"name": "regular", "configuration": {"chunk_shape": spec.chunk_shape}}
    metadata = {"shape": spec.shape, "data_type": spec.dtype, "codecs": codecs, "chunk_grid": grid}
    kvstore = {"driver": "file", "path": f"{folder.absolute()}/"}
    spec_json = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, "create": True}
    tensorstore.open(spec_json).result()


def array_names(folder: Path) -> set[str]:
    """Of the item ``state`` of an orbax checkpoint. Raises CheckpointError where it is damaged."""
    try:
        return {entry["key_metadata"][0]["key"] for entry in _metadata(folder)["tree_metadata"].values()}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _damaged(folder, "_METADATA names no arrays") from None


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((folder / "state" / "_METADATA").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"_METADATA cannot be read: {type(error).__name__}") from None
    if not isinstance(metadata, dict):
        raise _damaged(folder, "_METADATA is no object")
    return metadata


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged ({what}): use an older checkpoint, or make it again")


def open_arrays(folder: Path, read_at_once: dict[str, int]) -> dict[str, Any]:
    """TensorStore handles of arrays in the item ``state`` of any orbax checkpoint.

    ``read_at_once`` gives for each name how many elements a reader asks for: where that is less than a chunk, decoded
    chunks are kept for the next time.
    """
    state = folder.absolute() / "state"
    metadata = _metadata(folder)
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def start(name: str, context: tensorstore.Context | None = None) -> Any:
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{state}/{name}/"}
        if metadata.get("use_ocdbt"):
            kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
        # A chunk that is missing is damage, not zeros.
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, read=True, context=context)

    arrays = {}
    for name, future in {name: start(name) for name in read_at_once}.items():
        try:
            arrays[name] = future.result()
        except ValueError as error:
            raise _damaged(folder, f"array {name} cannot be opened") from error
    for name, elements in read_at_once.items():
        if math.prod(arrays[name].chunk_layout.read_chunk.shape) > elements:
            arrays[name] = start(name, cache).result()
    return arrays


class PlainArray(NamedTuple):
    """An array whose chunks are files of the bytes themselves, as ``create_checkpoint`` makes them."""

    folder: Path
    dtype: str
    chunk_shape: tuple[int, ...]

    def is_cut_by_rows(self, array: StackedArray) -> bool:
        """Whether each chunk holds whole tensors, or some rows of one in whole blocks."""
        lead, own = self.chunk_shape[: len(array.lead)], self.chunk_shape[len(array.lead) :]
        if len(self.chunk_shape) != len(array.shape) or min(self.chunk_shape) < 1:
            return False
        first, ours = array.tensor.order[0], array.tensor.ours
        count = ours[first] // own[first]
        if own != (*ours[:first], own[first], *ours[first + 1 :]) or count * own[first] != ours[first]:
            return False
        if any(length % n for length, n in zip(array.lead, lead, strict=True)):
            return False
        return count == 1 or (array.tensor.shape[0] // count % BLOCK == 0 and math.prod(lead) == 1)

    def parts(self, tensor: CheckpointTensor) -> list[StoredTensor]:
        """Where the bytes of one of its tensors lie: one part after the other, each some of its rows."""
        lead = self.chunk_shape[: len(tensor.place)]
        number = tuple(place // n for place, n in zip(tensor.place, lead, strict=True))
        before = [place % n for place, n in zip(tensor.place, lead, strict=True)]
        first = tensor.order[0]
        count = tensor.ours[first] // self.chunk_shape[len(lead) + first]
        shape = (tensor.shape[0] // count, *tensor.shape[1:])
        size = math.prod(shape) * np.dtype(self.dtype).itemsize
        start = int(np.ravel_multi_index(before, lead)) * size if lead else 0
        spelt = next(theirs for theirs, ours in DTYPES.items() if ours == self.dtype)
        files = (self.folder / chunk_key(tensor, (*number, part)) for part in range(count))
        return [StoredTensor(file, spelt, shape, start, size) for file in files]


def plain_array(folder: Path, name: str, array: StackedArray) -> PlainArray | None:
    """The array ``name`` in the item ``state``; None if its chunks are encoded or cut otherwise than here."""
    path = folder / "state" / name / "zarr.json"
    if not path.exists():
        return None
    try:
        metadata = json.loads(path.read_bytes())
        *turned, last = metadata["codecs"]
        order = sorted(array.order)
        if turned and turned[0]["name"] == "transpose":
            order = turned[0]["configuration"]["order"]
        if len(turned) > 1 or last["name"] != "bytes" or tuple(order) != array.order:
            return None
        chunk_shape = tuple(map(int, metadata["chunk_grid"]["configuration"]["chunk_shape"]))
        plain = PlainArray(path.parent, metadata["data_type"], chunk_shape)
        return plain if plain.dtype in DTYPES.values() and plain.is_cut_by_rows(array) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _damaged(folder, f"{path.relative_to(folder)} cannot be read: {type(error).__name__}") from None


def is_written(path: Path, size: int) -> bool:
    """Whether a file was written whole, by ``write_whole``."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def write_whole(path: Path, contents: Iterable[np.ndarray]) -> None:
    """Writes arrays one after the other to a file that is there with all its bytes or not at all.

    Raises CheckpointError where it cannot.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb", buffering=0) as file:
            for content in contents:
                write_all(file, content)
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error


def write_all(file: Any, content: np.ndarray) -> None:
    """Every byte of the array to an unbuffered file."""
    left = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What to tell of a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path} cannot be written: the disk is full; make room and run the same command again, it goes on "
            "where it stopped"
        )
    return CheckpointError(f"{path} cannot be written: {error.strerror}")
