"""A Hugging Face checkpoint as an orbax checkpoint of our tree: one pass, a chunk at a time."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsjax.checkpoint.array_files import ArraySpec, create_checkpoint, is_written, write_whole
from dsjax.checkpoint.companions import keep_companions
from dsjax.checkpoint.fp8_arrays import quantised
from dsjax.checkpoint.hf_checkpoint import HfCheckpoint, check_copy, copies, open_sound_checkpoint
from dsjax.checkpoint.hf_config import with_new_indexer
from dsjax.checkpoint.hf_names import SCALE_SUFFIX, CheckpointTensor
from dsjax.checkpoint.model_folder import HF
from dsjax.checkpoint.safetensors_files import DTYPES, StoredTensor, read_pieces, read_region
from dsjax.checkpoint.stacked import (
    Chunk,
    Grid,
    StackedArray,
    chunks,
    grid_of,
    pieces_of_rows,
    stacked_arrays,
)
from dsjax.checkpoint.staging import digest, staged, warn_if_scarce
from dsjax.checkpoint.weight_dtype import FP8, WeightDtype
from dsjax.checkpoint.workers import Job, run_all
from dsjax.observe.transfer import Transfer
from dsjax.precision.block_scales import BLOCK, dequantise


def import_checkpoint(
    source: Path, target: Path, *, dtype: WeightDtype | None = None, new_indexer: bool = False
) -> None:
    """Writes ``target`` with the weights as an orbax checkpoint in ``checkpoints/0`` and what came with them in ``hf``.

    ``dtype`` is that of the matrices, None for as they are; "fp8" keeps or makes e4m3 with block scales where the
    release has them. Vectors (norms, router biases) are float32. ``new_indexer`` adds a fresh lightning indexer to
    every layer of a model without one. An interrupted call goes on where it stopped.

    Raises CheckpointError for whatever is wrong with the source or the target; the target is whole or not there.
    """
    checkpoint = open_sound_checkpoint(source)
    if new_indexer:
        checkpoint = checkpoint._replace(config=with_new_indexer(checkpoint.config))
    order = {"source": str(source.resolve()), "dtype": dtype, "new_indexer": new_indexer}
    plan = _plan(checkpoint, dtype)
    order |= {"files": _fingerprint(checkpoint), "plan": digest([planned.specs() for planned in plan])}
    with staged(target, order) as folder:
        keep_companions(source, folder / HF, checkpoint.config.values)
        step = folder / "checkpoints" / "0"
        create_checkpoint(step, {name: spec for planned in plan for name, spec in planned.specs().items()})
        total = sum(math.prod(planned.array.shape) * np.dtype(planned.dtype).itemsize for planned in plan)
        warn_if_scarce(folder, total)
        with Transfer(f"import {source.name}", total) as transfer:
            comparisons = (functools.partial(check_copy, checkpoint, *copy) for copy in copies(checkpoint))
            run_all([*comparisons, *_writings(checkpoint, plan, step / "state", transfer)])


class _Planned(NamedTuple):
    """An array, how it is cut, and what it is stored as."""

    array: StackedArray
    grid: Grid
    dtype: str

    def specs(self) -> dict[str, ArraySpec]:
        """The arrays that it makes, by the names of the checkpoint's state."""
        chunk_shape = self.grid.chunk_shape(self.array)
        found = {self.name: ArraySpec(self.array.shape, self.dtype, chunk_shape, self.array.order)}
        if self.dtype == FP8:
            lead, (rows, columns) = self.array.lead, _blocks(self.array.tensor.shape)
            chunk_shape = (*self.grid.lead, columns, rows // self.grid.parts)
            order = (*range(len(lead)), len(lead) + 1, len(lead))
            found[self.name + SCALE_SUFFIX] = ArraySpec((*lead, columns, rows), "float32", chunk_shape, order)
        return found

    @property
    def name(self) -> str:
        """In the checkpoint's state."""
        return f"model.{self.array.path}"

    def files(self, chunk: Chunk) -> tuple[str, str]:
        """Of the chunk's values and of its scales."""
        *lead, part = chunk.number
        scales = "/".join(map(str, ("c", *lead, 0, part)))
        return f"{self.name}/{chunk.key(self.array)}", f"{self.name}{SCALE_SUFFIX}/{scales}"


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _plan(checkpoint: HfCheckpoint, requested: WeightDtype | None) -> list[_Planned]:
    arrays = stacked_arrays(tensor for tensor in checkpoint.expected() if not tensor.scale_of)
    plan = []
    for array in arrays.values():
        dtype = _dtype(array, checkpoint, requested)
        plan.append(_Planned(array, grid_of(array, np.dtype(dtype).itemsize), dtype))
    return plan


def _dtype(array: StackedArray, checkpoint: HfCheckpoint, requested: WeightDtype | None) -> str:
    if len(array.tensor.shape) == 1:
        return "float32"
    if requested == "fp8":
        return FP8 if array.tensor.dtype == "F8_E4M3" else "bfloat16"
    if requested:
        return requested
    return checkpoint.dtype_of(array)


class _Source:
    """Weights as they lie in the checkpoint, or fresh ones for an indexer that it has not."""

    def __init__(self, checkpoint: HfCheckpoint):
        self.checkpoint = checkpoint
        self.power_of_two = checkpoint.config.has_power_of_two_scales

    def read(
        self, tensor: CheckpointTensor, rows: slice, dtype: str
    ) -> tuple[Iterable[np.ndarray], list[np.ndarray]]:
        """Rows of a tensor in ``dtype``, in pieces, and their scales if that is FP8."""
        stored = self.checkpoint.stored.get(tensor.name)
        if stored is None:
            # Brings flax with it, half a second that other imports need not take.
            from dsjax.checkpoint.fresh_indexer import fresh_indexer_tensor

            values, scales = fresh_indexer_tensor(self.checkpoint.config, tensor, dtype)
            blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
            return [values[rows]], [scales[blocks]] if dtype == FP8 else []
        if DTYPES[stored.dtype] == dtype:
            return read_pieces(stored, rows), [self.checkpoint.scales(tensor, rows)] if dtype == FP8 else []
        pieces = pieces_of_rows(rows, tensor.shape)
        if dtype != FP8:
            return (self._converted(stored, tensor, piece, dtype) for piece in pieces), []
        what = f"{stored.file}: tensor {tensor.name}"
        made = [
            quantised(read_region(stored, piece), power_of_two=self.power_of_two, what=what)
            for piece in pieces
        ]
        return [values for values, _ in made], [scales for _, scales in made]

    def _converted(
        self, stored: StoredTensor, tensor: CheckpointTensor, rows: slice, dtype: str
    ) -> np.ndarray:
        values = read_region(stored, rows)
        if values.dtype == FP8:
            return np.asarray(dequantise(values, self.checkpoint.scales(tensor, rows), dtype))
        return values.astype(dtype, copy=False)


def _writings(
    checkpoint: HfCheckpoint, plan: list[_Planned], state: Path, transfer: Transfer
) -> Iterator[Job]:
    source = _Source(checkpoint)
    for planned in plan:
        for chunk in chunks(planned.array, planned.grid):
            yield functools.partial(_write, source, planned, chunk, state, transfer)


def _write(source: _Source, planned: _Planned, chunk: Chunk, state: Path, transfer: Transfer) -> None:
    values_file, scales_file = (state / name for name in planned.files(chunk))
    size = math.prod(planned.grid.chunk_shape(planned.array)) * np.dtype(planned.dtype).itemsize
    # The scales come first: where the values are, they are too.
    was_there = is_written(values_file, size)
    if not was_there:
        tensors = [planned.array.tensors[place] for place in chunk.places]
        read = [source.read(tensor, chunk.rows, planned.dtype) for tensor in tensors]
        if planned.dtype == FP8:
            write_whole(scales_file, itertools.chain.from_iterable(scales for _, scales in read))
        write_whole(values_file, itertools.chain.from_iterable(pieces for pieces, _ in read))
    transfer.advance(size, was_there=was_there)


def _fingerprint(checkpoint: HfCheckpoint) -> str:
    """Changes when a file of the checkpoint does."""
    files: dict[Path, StoredTensor] = {tensor.file: tensor for tensor in checkpoint.stored.values()}
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return digest(stats)
