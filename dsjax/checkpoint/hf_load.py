"""A Hugging Face checkpoint straight into device arrays: every process reads the bytes of its own shards."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from dsjax.checkpoint.fp8_arrays import everywhere
from dsjax.checkpoint.fresh_indexer import fresh_indexer_tensor
from dsjax.checkpoint.hf_checkpoint import HfCheckpoint, check_copy, copies
from dsjax.checkpoint.hf_names import CheckpointTensor
from dsjax.checkpoint.safetensors_files import read_region
from dsjax.checkpoint.stacked import StackedArray, stacked_arrays
from dsjax.checkpoint.weight_dtype import FP8
from dsjax.precision.block_scales import dequantise


def load_arrays(
    checkpoint: HfCheckpoint, wanted: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, Array]]:
    """The arrays of our tree, by path, with the dtypes and shardings of ``wanted``.

    An array is read as it lies in the checkpoint, [out, in] and perhaps FP8, each shard by the process that holds it,
    and then turned, scaled and cast on the devices. Block scales, 0.02 % of the bytes, are read by every process.
    """
    if jax.process_index() == 0:
        for copy in copies(checkpoint):
            check_copy(checkpoint, *copy)
    arrays = stacked_arrays(tensor for tensor in checkpoint.expected() if not tensor.scale_of)
    for path, array in arrays.items():
        yield path, _load(checkpoint, array, wanted[path])


def _load(checkpoint: HfCheckpoint, array: StackedArray, wanted: jax.ShapeDtypeStruct) -> Array:
    dtype = checkpoint.dtype_of(array)
    is_fp8 = dtype == FP8
    sharding: Any = wanted.sharding
    shape = tuple(array.shape[axis] for axis in array.order)
    read: Any = functools.partial(_read_shard, checkpoint, array, shape, dtype)
    values = jax.make_array_from_callback(shape, _turned(sharding, array.order), read)
    scales = _scales(checkpoint, array, sharding) if is_fp8 else None
    turn = functools.partial(_finish, array, dtype=wanted.dtype)
    return jax.jit(turn, out_shardings=sharding)(values, scales)


def _turned(sharding: Sharding, order: tuple[int, ...]) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (len(order) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))


def _finish(array: StackedArray, values: Array, scales: Array | None, *, dtype: Any) -> Array:
    """From the checkpoint's layout to ours."""
    if scales is not None:
        matrices = values.reshape(*array.lead, *array.tensor.shape)
        values = dequantise(matrices, scales, dtype).reshape(values.shape)
    return values.astype(dtype).transpose(np.argsort(array.order))


def _scales(checkpoint: HfCheckpoint, array: StackedArray, sharding: Sharding) -> Array:
    """Of every matrix of the array, on every device."""
    rows = slice(0, array.tensor.shape[0])
    scales = np.stack(
        [
            checkpoint.scales(tensor, rows)
            if tensor.name in checkpoint.stored
            else fresh_indexer_tensor(checkpoint.config, tensor, FP8)[1]
            for tensor in array.tensors.values()
        ]
    )
    scales = scales.reshape(*array.lead, *scales.shape[1:])
    return jax.make_array_from_callback(scales.shape, everywhere(sharding), lambda index: scales[index])


def _read_shard(
    checkpoint: HfCheckpoint,
    array: StackedArray,
    shape: tuple[int, ...],
    dtype: str,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part ``index`` of the array, as the checkpoint lays it out."""
    ranges = [range(*part.indices(length)) for part, length in zip(index, shape, strict=True)]
    lead, own = ranges[: len(array.lead)], ranges[len(array.lead) :]
    out = np.empty([len(part) for part in ranges], dtype)
    for numbers, place in zip(
        itertools.product(*(range(len(part)) for part in lead)), itertools.product(*lead), strict=True
    ):
        out[numbers] = _read_part(checkpoint, array.tensors[place], shape[len(lead) :], own, dtype)
    return out


def _read_part(
    checkpoint: HfCheckpoint, tensor: CheckpointTensor, shape: tuple[int, ...], part: list[range], dtype: str
) -> np.ndarray:
    """Of one tensor, whose two axes may be split in ``shape``, into heads for example.

    What is read is whole along all but the first axis of the rows and of the columns, and then cut.
    """
    stored = checkpoint.stored.get(tensor.name)
    if stored is None:
        values, _ = fresh_indexer_tensor(checkpoint.config, tensor, dtype)
        return values.reshape(shape)[tuple(slice(each.start, each.stop) for each in part)]
    if len(tensor.shape) == 1:
        return read_region(stored, slice(part[0].start, part[0].stop))
    # The axes before this one are the rows.
    first_column = next(n for n in range(1, len(shape)) if math.prod(shape[:n]) == tensor.shape[0])
    rows = _flat(part[0], tensor.shape[0] // shape[0])
    columns = _flat(part[first_column], tensor.shape[1] // shape[first_column])
    region = read_region(stored, rows, columns)
    read_shape = list(shape)
    read_shape[0], read_shape[first_column] = len(part[0]), len(part[first_column])
    rest = [slice(each.start, each.stop) for each in part]
    rest[0] = rest[first_column] = slice(None)
    return region.reshape(read_shape)[tuple(rest)]


def _flat(part: range, inner: int) -> slice:
    return slice(part.start * inner, part.stop * inner)
