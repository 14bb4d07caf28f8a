"""Orbax checkpoints read in pieces: those of a run, and those whose chunks ``array_files`` wrote as plain files."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from dsjax.checkpoint.array_files import is_written
from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_names import SCALE_SUFFIX, CheckpointTensor, checkpoint_tensors
from dsjax.checkpoint.safetensors_files import DTYPES, StoredTensor
from dsjax.checkpoint.stacked import CONVERTED_ELEMENTS, StackedArray, chunk_key, stacked_arrays
from dsjax.config import ModelConfig
from dsjax.precision.block_scales import BLOCK

_CACHE_BYTES = 1 << 30  # of decoded chunks, for arrays whose chunks are larger than what is read at once


class StoredModel:
    """The arrays of a model in the item ``state`` of an orbax checkpoint, opened and not read.

    Fields: ``tensors``, the checkpoint's own in their order; by the array's name in the state ``arrays``, what each
    stacks, ``handles``, TensorStore's, and ``plain``, where it is one; ``scaled``, names of those with block scales.
    """

    def __init__(self, step: Path, model: ModelConfig):
        """Raises CheckpointError where an array, or a chunk of a plain one, is missing or of another size."""
        self.step = step
        self.tensors = list(checkpoint_tensors(model))
        stacks = {f"model.{path}": array for path, array in stacked_arrays(self.tensors).items()}
        self.arrays = {name: array for name, array in stacks.items() if not array.tensor.scale_of}
        metadata = _metadata(step)
        found = _names(step, metadata)
        if missing := sorted(self.arrays.keys() - found):
            raise CheckpointError(
                f"{step} lacks array {missing[0]}: it is of another model than its config.json"
            )
        self.scaled = {name for name in self.arrays if name + SCALE_SUFFIX in found}
        stacks = {name: array for name, array in stacks.items() if name in found}
        self.handles = _opened(step, stacks, metadata)
        for name, array in stacks.items():
            shape = self.handles[name].shape
            if shape != array.shape:
                raise CheckpointError(
                    f"{step} has {name} with shape {shape}, expected {array.shape}: it is of another model than its "
                    "config.json"
                )
        self.plain = {name: _plain_array(step, name, array) for name, array in stacks.items()}
        for name, plain in self.plain.items():
            if plain:
                plain.check(step, stacks[name])


def _metadata(step: Path) -> dict[str, Any]:
    metadata = _json(step, step / "state" / "_METADATA")
    if not isinstance(metadata, dict):
        raise _damaged(step, "_METADATA is no object")
    return metadata


def _json(step: Path, path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(step, f"{path.relative_to(step)} is no JSON: {type(error).__name__}") from None


def _names(step: Path, metadata: dict[str, Any]) -> set[str]:
    try:
        return {entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _damaged(step, "_METADATA names no arrays") from None


def _damaged(step: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{step} is damaged ({what}): use an older checkpoint, or make it again")


def _opened(step: Path, arrays: dict[str, StackedArray], metadata: dict[str, Any]) -> dict[str, Any]:
    """TensorStore's handles; where a tensor is read in several pieces, decoded chunks are kept for the next one."""
    state = step.absolute() / "state"
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def start(name: str, context: tensorstore.Context | None = None) -> Any:
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{state}/{name}/"}
        if metadata.get("use_ocdbt"):
            kvstore = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
        # A chunk that is missing is damage, not zeros.
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, read=True, context=context)

    handles = {}
    for name, future in {name: start(name) for name in arrays}.items():
        try:
            handles[name] = future.result()
        except ValueError as error:
            raise _damaged(step, f"array {name} cannot be opened") from error
    for name, array in arrays.items():
        elements, chunk = math.prod(array.tensor.ours), math.prod(handles[name].chunk_layout.read_chunk.shape)
        if chunk > elements or elements > CONVERTED_ELEMENTS:
            handles[name] = start(name, cache).result()
    return handles


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

    def check(self, step: Path, array: StackedArray) -> None:
        """Raises CheckpointError where a chunk is missing or cut."""
        files = {part.file for tensor in array.tensors.values() for part in self.parts(tensor)}
        size = math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize
        for file in sorted(files):
            if not is_written(file, size):
                raise _damaged(step, f"{file.relative_to(step)} is missing, or not of {size:,} bytes")

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


def _plain_array(step: Path, name: str, array: StackedArray) -> PlainArray | None:
    """None if the chunks are encoded or cut otherwise than here."""
    path = step / "state" / name / "zarr.json"
    if not path.exists():
        return None
    metadata = _json(step, path)
    try:
        *turned, last = metadata["codecs"]
        order = sorted(array.order)
        if turned and turned[0]["name"] == "transpose":
            order = turned[0]["configuration"]["order"]
        if len(turned) > 1 or last["name"] != "bytes" or tuple(order) != array.order:
            return None
        chunk_shape = tuple(map(int, metadata["chunk_grid"]["configuration"]["chunk_shape"]))
        plain = PlainArray(path.parent, metadata["data_type"], chunk_shape)
        return plain if plain.dtype in DTYPES.values() and plain.is_cut_by_rows(array) else None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(step, f"{path.relative_to(step)} describes no array: {type(error).__name__}") from None
