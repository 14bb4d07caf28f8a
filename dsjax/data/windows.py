"""Documents cut or packed into windows, each found by its number: nothing but that number is needed to resume.

``ConcatWindows`` is for pre-training: documents one after another, cut where a window ends, no padding.
``PackedWindows`` keeps documents whole as long as they fit: for fine-tuning, where they are isolated, and for long
contexts.
"""

import bisect
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Bool, Float32, Int32, Int64

from dsjax.data.documents import EDGE_TOKENS, FIM_TOKENS, Controls, Documents, random_cut, rendered

_T = TypeVar("_T")
_SHUFFLE_ROUNDS = 4
_EPOCHS_KEPT = 2  # a reader may be ahead in the next one


class Batch(TypedDict):
    """What a step sees; a window has the same fields without B."""

    tokens: Int32[np.ndarray, "*B T"]
    targets: Int32[np.ndarray, "*B T"]  # the token that follows
    segment_ids: Int32[np.ndarray, "*B T"]  # 1, 2, … by document that may be seen together; 0 for padding
    positions: Int32[np.ndarray, "*B T"]  # from 0 in each segment
    loss_mask: Float32[np.ndarray, "*B T"]  # 1 where the target counts, else 0


class Shape(NamedTuple):
    """What a window is, and what becomes of documents."""

    length: int  # tokens of a window
    isolate: bool  # whether a document is a segment of its own, with positions from 0
    fim_rate: float  # share of the documents whose middle is moved to their end, others every epoch
    seed: int


class _Reader:
    """Documents as they stand in the windows of an epoch."""

    def __init__(self, documents: Documents, shape: Shape, controls: Controls):
        self.documents, self.shape, self.controls = documents, shape, controls
        self.whole_lengths = documents.lengths.astype(np.int64) + EDGE_TOKENS
        self.moved_an_epoch = round(shape.fim_rate * len(self.whole_lengths))
        self.moved = _kept(self._moved)

    def rng(self, epoch: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.shape.seed, epoch, purpose))

    def _moved(self, epoch: int) -> Bool[np.ndarray, "D"]:
        moved = np.zeros(len(self.whole_lengths), bool)
        if self.moved_an_epoch:
            moved[self.rng(epoch, 1).permutation(len(moved))[: self.moved_an_epoch]] = True
        return moved

    def read(self, epoch: int, document: int, start: int, stop: int) -> Int32[np.ndarray, "T"]:
        """Some tokens of a document, its control tokens counted; fewer where it ends before ``stop``."""
        cut = None
        if self.moved(epoch)[document]:
            key = (self.shape.seed, epoch, 2, document)
            cut = random_cut(int(self.documents.lengths[document]), key)
        return rendered(self.documents, document, cut, self.controls, start, stop)

    def shuffled(self, epoch: int, number: int, count: int) -> int:
        """The window that comes at place ``number`` of an epoch."""
        seed = int(self.rng(epoch, 3).integers(2**31))
        return index_shuffle(number, count - 1, seed, _SHUFFLE_ROUNDS)


class ConcatWindows:
    """Every document of an epoch in random order, one after another, and windows of ``length + 1`` of their tokens.

    A window begins at the last token of the one before, so every token is a target once an epoch; the last window is
    filled up with padding. Isolated, no loss falls on predicting the next document's start.

    Fields: ``count``, windows an epoch; ``padding``, share of all places that no token stands in.
    """

    def __init__(self, documents: Documents, shape: Shape, controls: Controls):
        self._reader = _Reader(documents, shape, controls)
        self._shape, self._pad_id = shape, controls.pad
        targets = int(self._reader.whole_lengths.sum()) + FIM_TOKENS * self._reader.moved_an_epoch - 1
        self.count = -(-max(targets, 0) // shape.length)
        self.padding = 1 - targets / (self.count * shape.length) if self.count else 0.0
        self._order = _kept(self._ordered)

    def _ordered(self, epoch: int) -> tuple[Int64[np.ndarray, "D"], Int64[np.ndarray, "D+1"]]:
        """The documents of an epoch, and where each begins in the stream of their tokens, and the stream's end."""
        lengths = self._reader.whole_lengths + FIM_TOKENS * self._reader.moved(epoch)
        order = self._reader.rng(epoch, 0).permutation(len(lengths))
        return order, np.concatenate([[0], np.cumsum(lengths[order])])

    def packing(self) -> str:
        """How documents became windows, in words."""
        return f"{self.count:,} windows an epoch, {self.padding:.2%} padding"

    def window(self, epoch: int, number: int) -> Batch:
        """The window at place ``number`` of an epoch, 0 to ``count - 1``."""
        length, (order, starts) = self._shape.length, self._order(epoch)
        first = self._reader.shuffled(epoch, number, self.count) * length
        stop = min(first + length + 1, int(starts[-1]))
        low = int(np.searchsorted(starts, first, "right")) - 1
        high = int(np.searchsorted(starts, stop))
        parts, begins = [], np.zeros(stop - first, bool)
        for place in range(low, high):
            begin = int(starts[place])
            part = (max(first - begin, 0), min(stop, int(starts[place + 1])) - begin)
            parts.append(self._reader.read(epoch, int(order[place]), *part))
            begins[max(begin - first, 0)] = begin >= first and self._shape.isolate
        span = np.concatenate(parts)
        begins[0] = False
        places = np.arange(len(span), dtype=np.int32)
        batch = empty_batch((length,), self._pad_id)
        filled = slice(len(span) - 1)
        batch["tokens"][filled], batch["targets"][filled] = span[:-1], span[1:]
        batch["segment_ids"][filled] = (1 + np.cumsum(begins, dtype=np.int32))[:-1]
        batch["positions"][filled] = (places - np.maximum.accumulate(np.where(begins, places, 0)))[:-1]
        batch["loss_mask"][filled] = 1 - begins[1:]
        return batch


class PackedWindows:
    """Documents whole, packed by best fit, the longest first; those longer than a window are cut into several.

    Each document's last token is a target only, so one of ``length + 1`` tokens fits. What fits is decided once for all
    epochs; with ``fim_rate`` every document is given the room of one whose middle is moved.

    Fields: ``count``, windows an epoch; ``documents`` of the set; ``cut``, how many are longer than a window;
    ``padding``, share of all places that no token stands in, the room for moved middles not counted.
    """

    def __init__(self, documents: Documents, shape: Shape, controls: Controls):
        self._reader = _Reader(documents, shape, controls)
        self._shape, self._pad_id = shape, controls.pad
        rooms = (
            self._reader.whole_lengths + (FIM_TOKENS if shape.fim_rate else 0) - 1
        )  # places of their inputs
        whole, rest = rooms // shape.length, rooms % shape.length
        self.documents = len(rooms)
        self.cut = int(np.count_nonzero(rooms > shape.length))
        full = np.repeat(np.arange(len(rooms)), whole)
        firsts = np.concatenate([[0], np.cumsum(whole)])
        self._bins = [[(int(number), int(place - firsts[number]))] for place, number in enumerate(full)]
        self._bins += _best_fit(rest, whole, shape.length)
        self.count = len(self._bins)
        self.padding = 1 - int(rooms.sum()) / (self.count * shape.length) if self.count else 0.0

    def packing(self) -> str:
        """How documents became windows, in words."""
        cut = f"{self.cut:,} of {self.documents:,} documents cut"
        return f"{self.count:,} windows an epoch, {self.padding:.2%} padding, {cut}"

    def window(self, epoch: int, number: int) -> Batch:
        """The window at place ``number`` of an epoch, 0 to ``count - 1``."""
        length = self._shape.length
        batch = empty_batch((length,), self._pad_id)
        filled = segment = 0
        for document, part in self._bins[self._reader.shuffled(epoch, number, self.count)]:
            start = part * length
            tokens = self._reader.read(epoch, document, start, start + length + 1)
            size = len(tokens) - 1
            if size < 1:  # room for a middle that is not moved
                continue
            segment += 1
            here = slice(filled, filled + size)
            batch["tokens"][here], batch["targets"][here] = tokens[:-1], tokens[1:]
            batch["segment_ids"][here] = segment if self._shape.isolate else 1
            batch["positions"][here] = np.arange(size) + (0 if self._shape.isolate else filled)
            batch["loss_mask"][here] = 1
            filled += size
        return batch


def _best_fit(
    rooms: Int64[np.ndarray, "D"], parts: Int64[np.ndarray, "D"], length: int
) -> list[list[tuple[int, int]]]:
    """Bins of ``length`` for pieces of these sizes: each, from the longest on, goes where least is left over.

    Pieces of size 0 go nowhere. A piece is its document's number and which part of it: the last, after ``parts``.
    """
    bins: list[list[tuple[int, int]]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    left: list[int] = []  # the different sizes of what is left in bins, rising
    for number in np.argsort(-rooms, kind="stable").tolist():
        size = int(rooms[number])
        if not size:
            break
        found = bisect.bisect_left(left, size)
        if found < len(left):
            room = left[found]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del left[found]
        else:
            room, chosen = length, len(bins)
            bins.append([])
        bins[chosen].append((number, int(parts[number])))
        room -= size
        if room and not by_room[room]:
            bisect.insort(left, room)
        by_room[room].append(chosen)
    return bins


def empty_batch(shape: tuple[int, ...], pad_id: int) -> Batch:
    """Padding alone."""
    return Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.float32),
    )


def _kept(compute: Callable[[int], _T]) -> Callable[[int], _T]:
    """The same function of an epoch, computed once for all threads and kept for a while."""
    lock, cached = threading.Lock(), functools.lru_cache(_EPOCHS_KEPT)(compute)

    def get(epoch: int) -> _T:
        with lock:
            return cached(epoch)

    return get
