"""Orbax checkpoints written in pieces: arrays larger than memory, a chunk at a time.

What is written here is an ordinary orbax checkpoint of uncompressed zarr arrays, in which every chunk is a file of the
bytes themselves. ``stored_arrays`` reads it.
"""

import errno
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

    Where that fails its threads go on complaining after it has ended, so first we see whether there is room.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_zarr3, saving.array_metadata_store = False, True, None
    # Interrupted, orbax may still be writing when the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "0"
        _try_to_write(Path(temporary), len(arrays))
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


def _try_to_write(folder: Path, arrays: int) -> None:
    """More than orbax will; raises OSError where it would fail."""
    probes = [folder / f"probe{number}" for number in range(arrays + 1)]
    for probe in probes:
        probe.write_bytes(bytes(16 << 10 if probe != probes[0] else arrays << 10))
    for probe in probes:
        probe.unlink()


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
    """What to tell of a file that cannot be written: that of the error, or else ``path``."""
    path = Path(error.filename) if isinstance(error.filename, str) else path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path} cannot be written: the disk is full; make room and run the same command again, it goes on "
            "where it stopped"
        )
    return CheckpointError(
        f"{path} cannot be written: {error.strerror}; set that right and run the same command again"
    )
