"""A Hugging Face checkpoint as it lies on disk, against what its configuration promises."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_config import HfConfig, read_config, without_mtp
from dsjax.checkpoint.hf_names import (
    EMBEDDING,
    SCALE_SUFFIX,
    CheckpointTensor,
    checkpoint_tensors,
    is_derived,
    mtp_prefix,
)
from dsjax.checkpoint.safetensors_files import DTYPES, StoredTensor, read_directory, read_pieces, read_region
from dsjax.checkpoint.stacked import StackedArray
from dsjax.precision.block_scales import BLOCK

_COMPARED_BYTES = 64 << 20


class HfCheckpoint(NamedTuple):
    """What ``config.json``, the index and the headers say; no weight has been read."""

    config: HfConfig
    stored: dict[str, StoredTensor]
    lacks_mtp: bool = False  # promised by config.json, and none of it is there: taken as a model without

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.config.path.parent

    def expected(self) -> Iterator[CheckpointTensor]:
        """The tensors that its configuration promises; scales only where its matrices are FP8."""
        for tensor in checkpoint_tensors(self.config.model):
            if self.config.is_fp8 or not tensor.scale_of:
                yield tensor

    def dtype_of(self, array: StackedArray) -> str:
        """That of its tensors here, float32 where they differ. A new indexer is like the rest of the checkpoint."""
        stored = [self.stored.get(tensor.name) for tensor in array.tensors.values()]
        new = array.tensor.dtype if self.config.is_fp8 else self.stored[EMBEDDING].dtype
        found = {DTYPES[tensor.dtype if tensor else new] for tensor in stored}
        return found.pop() if len(found) == 1 else "float32"

    def scales(self, tensor: CheckpointTensor, rows: slice) -> np.ndarray:
        """The scales of some rows of an FP8 matrix, from a whole block on. Raises CheckpointError for a bad one."""
        name = tensor.name + SCALE_SUFFIX
        stored = self.stored[name]
        scales = read_region(stored, slice(rows.start // BLOCK, -(-rows.stop // BLOCK)))
        wrong = scales[~(np.isfinite(scales) & (scales > 0))]
        if wrong.size:
            raise CheckpointError(
                f"{stored.file}: tensor {name} holds the scale {wrong[0]}: scales must be positive numbers"
            )
        return scales


def open_checkpoint(directory: Path) -> HfCheckpoint:
    """Reads the configuration, the index and all headers. Raises CheckpointError where one of them is unsound."""
    if not os.path.isdir(directory):  # Path.is_dir raises for names that are too long
        raise CheckpointError(f"{directory} is not a directory: name the one that holds config.json")
    config, stored = read_config(directory), read_directory(directory)
    mtp = mtp_prefix(config.model)
    if not any(name.startswith(mtp) for name in stored):
        # transformers and others save no multi-token prediction, whatever the configuration says.
        promised = config.model.num_nextn_predict_layers > 0
        return HfCheckpoint(without_mtp(config), stored, promised)
    return HfCheckpoint(config, stored)


def problems(checkpoint: HfCheckpoint) -> Iterator[str]:
    """A sentence for each tensor that is missing, mis-shaped, mis-typed or not expected."""
    found = set()
    for tensor in checkpoint.expected():
        found.add(tensor.name)
        stored = checkpoint.stored.get(tensor.name)
        if stored is None:
            yield f"{checkpoint.directory} lacks tensor {tensor.name}"
            continue
        if stored.shape != tensor.shape:
            yield f"{stored.file}: tensor {tensor.name} has shape {stored.shape}, expected {tensor.shape}"
        # What is not FP8 is written by many tools, in one precision throughout; but BF16 spoils router biases.
        exact = tensor.dtype == "F8_E4M3" or tensor.scale_of or tensor.name.endswith("_bias")
        allowed = (tensor.dtype,) if checkpoint.config.is_fp8 and exact else ("BF16", "F32")
        if stored.dtype not in allowed:
            yield f"{stored.file}: tensor {tensor.name} is {stored.dtype}, expected {' or '.join(allowed)}"
    for name in sorted(name for name in checkpoint.stored.keys() - found if not is_derived(name)):
        yield f"{checkpoint.stored[name].file}: tensor {name} is not part of the model"


def open_sound_checkpoint(directory: Path) -> HfCheckpoint:
    """The checkpoint if it holds what it should; raises CheckpointError with the first problem and their number."""
    checkpoint = open_checkpoint(directory)
    found = list(problems(checkpoint))
    if found:
        more = f" (and {len(found) - 1:,} more: see `convert inspect`)" if len(found) > 1 else ""
        raise CheckpointError(found[0] + more)
    return checkpoint


def copies(checkpoint: HfCheckpoint) -> Iterator[tuple[str, str, slice]]:
    """Tensors that must repeat another one, with that one's name, a few rows at a time."""
    for tensor in checkpoint.expected():
        if tensor.copy_of:
            rows = max(1, _COMPARED_BYTES * tensor.shape[0] // checkpoint.stored[tensor.name].size)
            for start in range(0, tensor.shape[0], rows):
                yield tensor.name, tensor.copy_of, slice(start, min(start + rows, tensor.shape[0]))


def check_copy(checkpoint: HfCheckpoint, name: str, original: str, rows: slice) -> None:
    """Raises CheckpointError where the tensors differ."""
    both = (read_pieces(checkpoint.stored[each], rows) for each in (name, original))
    if not all(np.array_equal(one, other) for one, other in zip(*both, strict=True)):
        raise CheckpointError(
            f"{checkpoint.stored[name].file}: tensor {name} differs from {original}, which it should repeat: "
            "the model has one array for both"
        )
