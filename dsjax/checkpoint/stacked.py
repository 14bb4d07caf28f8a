"""The arrays of our tree as stacks of a checkpoint's tensors, and the chunks in which they are written.

A chunk holds the bytes of its tensors as they lie in the checkpoint, [out, in], one after the other: a zarr array may
say of its chunks that they are transposed. So importing copies bytes, and whoever reads the array gets [in, out].
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsjax.checkpoint.hf_names import CheckpointTensor
from dsjax.precision.block_scales import BLOCK

_LARGEST_CHUNK_BYTES = 64 << 20
CONVERTED_ELEMENTS = 16 << 20  # at a time
_GROUPED_CHUNK_BYTES = 4 << 20  # smaller tensors share a chunk up to this size


class StackedArray(NamedTuple):
    """An array of our tree and the tensors that it stacks."""

    path: str
    lead: tuple[int, ...]  # layers, experts, or nothing
    tensors: dict[tuple[int, ...], CheckpointTensor]  # by place, in order

    @property
    def tensor(self) -> CheckpointTensor:
        """Any of its tensors: but for name and place they are alike."""
        return next(iter(self.tensors.values()))

    @property
    def is_fp8(self) -> bool:
        """Whether the release has it in FP8."""
        return self.tensor.dtype == "F8_E4M3"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array, as our tree has it."""
        return (*self.lead, *self.tensor.ours)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of ``shape`` in the order in which the bytes lie."""
        first = len(self.lead)
        return (*range(first), *(first + axis for axis in self.tensor.order))


def stacked_arrays(tensors: Iterable[CheckpointTensor]) -> dict[str, StackedArray]:
    """The arrays by path; copies of other tensors belong to none."""
    places: dict[str, dict[tuple[int, ...], CheckpointTensor]] = {}
    for tensor in tensors:
        if not tensor.copy_of:
            places.setdefault(tensor.path, {})[tensor.place] = tensor
    return {
        path: StackedArray(path, tuple(last + 1 for last in max(found)), found)
        for path, found in places.items()
    }


class Grid(NamedTuple):
    """How an array is cut: how many tensors of each leading axis share a chunk, and into how many parts one is cut.

    The scales of a matrix are cut like the matrix.
    """

    lead: tuple[int, ...]
    parts: int

    def chunk_shape(self, array: StackedArray) -> tuple[int, ...]:
        """In the axes of ``array.shape``."""
        ours = list(array.tensor.ours)
        ours[array.tensor.order[0]] //= self.parts
        return (*self.lead, *ours)


class Chunk(NamedTuple):
    """Some rows of some tensors of an array."""

    number: tuple[int, ...]  # in the grid: one number a leading axis, and the part
    places: tuple[tuple[int, ...], ...]
    rows: slice  # of each of the tensors, as they lie in the checkpoint

    def key(self, array: StackedArray) -> str:
        """The file of the chunk within a zarr array."""
        return chunk_key(array.tensor, self.number)


def chunk_key(tensor: CheckpointTensor, number: tuple[int, ...]) -> str:
    """The file within a zarr array, whose grid has an index for every axis."""
    ours = [0] * len(tensor.ours)
    ours[tensor.order[0]] = number[-1]
    return "/".join(map(str, ("c", *number[:-1], *ours)))


def grid_of(array: StackedArray, item_bytes: int) -> Grid:
    """A grid with chunks of moderate size."""
    size = math.prod(array.tensor.shape) * item_bytes
    if size >= _GROUPED_CHUNK_BYTES:
        return Grid((1,) * len(array.lead), _parts(array.tensor, size))
    lead = []
    for count in reversed(array.lead):  # experts, then layers
        together = max(n for n in _divisors(count) if n == 1 or n * size <= _GROUPED_CHUNK_BYTES)
        lead.append(together)
        size = size * together if together == count else _GROUPED_CHUNK_BYTES
    return Grid(tuple(reversed(lead)), 1)


def _parts(tensor: CheckpointTensor, size: int) -> int:
    """Into how many parts a matrix is cut: of whole blocks of rows, and of whole heads."""
    first = tensor.ours[tensor.order[0]]
    possible = [n for n in _divisors(first) if n == 1 or tensor.shape[0] // n % BLOCK == 0]
    small_enough = [n for n in possible if size / n <= _LARGEST_CHUNK_BYTES]
    return min(small_enough, default=max(possible))


def pieces_of_rows(rows: slice, shape: tuple[int, ...], unit: int = 1) -> Iterator[slice]:
    """Rows of a tensor, so many as are converted at once: in whole blocks, and in multiples of ``unit``."""
    unit = math.lcm(BLOCK, unit)
    step = unit * max(1, CONVERTED_ELEMENTS // (unit * math.prod(shape[1:])))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def chunks(array: StackedArray, grid: Grid) -> Iterator[Chunk]:
    """Every chunk of the array."""
    rows = array.tensor.shape[0] // grid.parts
    counts = [length // together for length, together in zip(array.lead, grid.lead, strict=True)]
    for number in itertools.product(*map(range, counts), range(grid.parts)):
        starts = [n * together for n, together in zip(number, grid.lead, strict=False)]
        ranges = (range(start, start + n) for start, n in zip(starts, grid.lead, strict=True))
        part = slice(number[-1] * rows, (number[-1] + 1) * rows)
        yield Chunk(number, tuple(itertools.product(*ranges)), part)
