"""A checkpoint of ours as a Hugging Face directory: index, shards, configuration and tokenizer, in one pass."""

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax.checkpoint.array_files import is_written, write_all, write_error
from dsjax.checkpoint.companions import copy_kept
from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.fp8_arrays import quantised
from dsjax.checkpoint.hf_config import config_values, has_power_of_two_scales
from dsjax.checkpoint.hf_names import SCALE_SUFFIX, CheckpointTensor
from dsjax.checkpoint.model_folder import ModelFolder, open_model_folder
from dsjax.checkpoint.safetensors_files import (
    DTYPES,
    INDEX,
    encoded_header,
    item_bytes,
    read_pieces,
    read_region,
)
from dsjax.checkpoint.stacked import pieces_of_rows
from dsjax.checkpoint.staging import digest, staged, warn_if_scarce
from dsjax.checkpoint.stored_arrays import StoredModel
from dsjax.checkpoint.weight_dtype import FP8, WeightDtype
from dsjax.checkpoint.workers import Job, run_all
from dsjax.observe.transfer import Transfer
from dsjax.precision.block_scales import BLOCK, dequantise


def export_checkpoint(
    source: Path, target: Path, *, dtype: WeightDtype | None = None, shard_bytes: int = 5_000_000_000
) -> None:
    """Writes ``target`` from what ``import_checkpoint`` or ``train.py`` left in ``source``, its newest checkpoint.

    ``dtype`` is that of the matrices, None for as they are; "fp8" is e4m3 with float32 scales for blocks of 128 by 128
    where the release has them. An interrupted call goes on where it stopped, file by file.

    Raises CheckpointError for whatever is wrong with the source or the target; the target is whole or not there.
    """
    folder = open_model_folder(source)
    weights = _Weights(folder, dtype)
    shards = _shards(weights, shard_bytes)
    order = {"source": str(folder.path.resolve()), "dtype": dtype, "shard_bytes": shard_bytes}
    made = (folder.step / "state" / "_METADATA").stat()
    order["files"] = f"step {folder.step.name}, {made.st_mtime_ns} {made.st_ino}"
    order["plan"] = digest([shard.header for shard in shards])
    if (folder.path / "checkpoints").resolve() in target.resolve().parents:
        raise CheckpointError(f"{target} lies among the checkpoints of {folder.path}: name another folder")
    with staged(target, order) as partial:
        values = config_values(
            folder.model, is_fp8=weights.is_fp8, dtype=weights.torch_dtype, base=folder.hf_values
        )
        _write_index(partial, shards)
        copy_kept(folder, partial, values)
        total = sum(shard.size for shard in shards)
        warn_if_scarce(partial, total)
        with Transfer(f"export {source.name}", total) as transfer:
            for shard in shards:
                _write_shard(weights, shard, partial / shard.name, transfer)


class _Shard(NamedTuple):
    """A file to be written."""

    name: str
    header: bytes
    tensors: list[CheckpointTensor]
    size: int  # bytes of the whole file


class _Weights:
    """The arrays of the checkpoint, read a few rows of a tensor at a time as the checkpoint of the release has them."""

    def __init__(self, folder: ModelFolder, dtype: WeightDtype | None):
        self.stored = StoredModel(folder.step, folder.model)
        self.power_of_two = has_power_of_two_scales(folder.model, folder.hf_values)
        self.dtype = dtype or self._as_they_are()
        self.is_fp8 = self.dtype == "fp8"
        self.torch_dtype = "bfloat16" if self.is_fp8 else self.dtype
        self.tensors = [tensor for tensor in self.stored.tensors if self.is_fp8 or not tensor.scale_of]

    def _as_they_are(self) -> WeightDtype:
        arrays, scaled = self.stored.arrays, self.stored.scaled
        if scaled and all(name in scaled for name, array in arrays.items() if array.is_fp8):
            return "fp8"
        matrices = [name for name, array in arrays.items() if len(array.tensor.shape) == 2]
        found = {self.stored.handles[name].dtype.name for name in matrices}
        return "bfloat16" if found == {"bfloat16"} else "float32"

    def dtype_of(self, tensor: CheckpointTensor) -> str:
        """As safetensors spells it."""
        if self.dtype == "float32" and not tensor.scale_of:
            return "F32"
        return "BF16" if tensor.dtype == "F8_E4M3" and not self.is_fp8 else tensor.dtype

    def pieces(self, tensor: CheckpointTensor) -> Iterator[np.ndarray]:
        """Its bytes in order; of a matrix that is quantised here, its scales' bytes follow."""
        name, dtype = f"model.{tensor.path}", DTYPES[self.dtype_of(tensor)]
        if name not in self.stored.handles:  # scales of what is quantised here: written behind their matrix
            return
        plain = self.stored.plain[name]
        if plain and plain.dtype == dtype:
            for part in plain.parts(tensor):
                yield from read_pieces(part, slice(0, part.shape[0]))
            return
        scales_here = []
        for rows, values in self._values(name, tensor):
            if name in self.stored.scaled and dtype != FP8:
                yield np.asarray(dequantise(values, self._scales(name, tensor, rows), dtype))
            elif name not in self.stored.scaled and dtype == FP8:
                what = f"{self.stored.step}: tensor {tensor.name}"
                values, scales = quantised(values, power_of_two=self.power_of_two, what=what)
                scales_here.append(scales)
                yield values
            else:
                yield values.astype(dtype, copy=False)
        yield from scales_here

    def _values(self, name: str, tensor: CheckpointTensor) -> Iterator[tuple[slice, np.ndarray]]:
        """A tensor as the checkpoint of the release lays it out, some rows at a time."""
        plain = self.stored.plain[name]
        if plain:
            start = 0
            for part in plain.parts(tensor):
                for rows in pieces_of_rows(slice(0, part.shape[0]), part.shape):
                    yield slice(start + rows.start, start + rows.stop), read_region(part, rows)
                start += part.shape[0]
            return
        turned = self.stored.handles[name][tensor.place].transpose(list(tensor.order))
        inner = tensor.shape[0] // turned.shape[0]  # a head's width
        for rows in pieces_of_rows(slice(0, tensor.shape[0]), tensor.shape, inner):
            part = turned[rows.start // inner : rows.stop // inner]
            values = self._result(part.read(order="C"), name)
            yield rows, values.reshape(-1, *tensor.shape[1:])

    def _scales(self, name: str, tensor: CheckpointTensor, rows: slice) -> np.ndarray:
        turned = self.stored.handles[name + SCALE_SUFFIX][tensor.place].transpose([1, 0])
        part = turned[rows.start // BLOCK : -(-rows.stop // BLOCK)]
        return self._result(part.read(order="C"), name + SCALE_SUFFIX)

    def _result(self, future: Any, name: str) -> np.ndarray:
        try:
            return future.result()
        except ValueError as error:
            reason = str(error).split(": ")[0]
            raise CheckpointError(
                f"{self.stored.step}: array {name} is damaged ({reason}): make it again"
            ) from error


def _shards(weights: _Weights, shard_bytes: int) -> list[_Shard]:
    """Files of at most ``shard_bytes`` of weights, or of one tensor; a matrix and its scales share one."""
    groups: list[list[CheckpointTensor]] = [[]]
    filled = 0
    for tensor in weights.tensors:
        size = _size(weights, tensor)
        if groups[-1] and filled + size > shard_bytes and not tensor.scale_of:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return [_shard(weights, group, number, len(groups)) for number, group in enumerate(groups, 1)]


def _shard(weights: _Weights, tensors: list[CheckpointTensor], number: int, count: int) -> _Shard:
    entries = [(tensor.name, weights.dtype_of(tensor), tensor.shape) for tensor in tensors]
    header = encoded_header(entries)
    size = len(header) + sum(_size(weights, tensor) for tensor in tensors)
    return _Shard(f"model-{number:05}-of-{count:06}.safetensors", header, tensors, size)


def _size(weights: _Weights, tensor: CheckpointTensor) -> int:
    return math.prod(tensor.shape) * item_bytes(weights.dtype_of(tensor))


def _write_index(folder: Path, shards: list[_Shard]) -> None:
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.size - len(shard.header) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    try:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise write_error(folder / INDEX, error) from error


def _write_shard(weights: _Weights, shard: _Shard, path: Path, transfer: Transfer) -> None:
    """All tensors of a file at once, each at its place; the file has its name when they are done."""
    if is_written(path, shard.size):
        transfer.advance(shard.size, was_there=True)
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
        transfer.advance(len(shard.header))
        run_all(_writings(weights, shard, partial, transfer))
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error


def _writings(weights: _Weights, shard: _Shard, path: Path, transfer: Transfer) -> Iterator[Job]:
    start = len(shard.header)
    for tensor in shard.tensors:
        yield functools.partial(_write_tensor, weights, tensor, path, start, transfer)
        start += _size(weights, tensor)


def _write_tensor(
    weights: _Weights, tensor: CheckpointTensor, path: Path, start: int, transfer: Transfer
) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        for piece in weights.pieces(tensor):
            write_all(file, piece)
            transfer.advance(piece.nbytes)
