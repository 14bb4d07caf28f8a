"""Several sets in exact proportions, and the rows of batches that a process reads."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from dsjax.data.windows import Batch

_CYCLE = (
    10_000  # windows after which the same sets come in the same turn; proportions are exact to one in so many
)


class Windows(Protocol):
    """Windows of one set; each epoch has ``count`` of them, in an order of its own."""

    count: int
    padding: float

    def packing(self) -> str:
        """How documents became windows, in words."""
        ...

    def window(self, epoch: int, number: int) -> Batch:
        """The window at place ``number`` of an epoch."""
        ...


class Mixture:
    """An endless row of windows, each from the set whose turn it is: after any number of windows, and in every cycle,
    each set had its share of them, but for less than one window.

    A set that ends begins its next epoch, whatever the others do. A source for grain: any window by its number.
    """

    def __init__(self, sets: Sequence[Windows], weights: Sequence[float]):
        """``weights`` are shares of the windows, of any sum."""
        self.sets = list(sets)
        self._turn = _turns(np.asarray(weights, np.float64), _CYCLE if len(self.sets) > 1 else 1)
        chosen = self._turn[:, None] == np.arange(len(self.sets))
        self._a_cycle = chosen.sum(0)
        self._before = np.cumsum(chosen, 0)[np.arange(len(self._turn)), self._turn] - 1

    def __len__(self) -> int:
        return 1 << 62  # without an end

    def place(self, number: int) -> tuple[int, int, int]:
        """The set of window ``number``, the epoch of that set, and the place in it."""
        cycle, within = divmod(number, len(self._turn))
        chosen = int(self._turn[within])
        place = cycle * int(self._a_cycle[chosen]) + int(self._before[within])
        return chosen, *divmod(place, self.sets[chosen].count)

    def __getitem__(self, number: int) -> Batch:
        """Window ``number``."""
        chosen, epoch, place = self.place(number)
        return self.sets[chosen].window(epoch, place)


def _turns(weights: Int64[np.ndarray, "S"], length: int) -> Int64[np.ndarray, "L"]:
    """Whose turn it is: always that of the set which is furthest behind its share."""
    shares = weights / weights.sum()
    counts = np.floor(shares * length).astype(int)
    counts[np.argsort(counts - shares * length, kind="stable")[: length - counts.sum()]] += 1
    shares, had = counts / length, np.zeros(len(weights))
    turns = np.empty(length, int)
    for place in range(length):
        # Of those that had not yet all of theirs, so that a cycle ends exactly.
        turns[place] = np.argmax(np.where(had < counts, shares * (place + 1) - had, -np.inf))
        had[turns[place]] += 1
    return turns


class ProcessRows:
    """Of a row of windows that is cut into batches, the ``rows`` of each batch that a process reads, from a batch on.

    Every process reads a part of each batch, so batches are the same however many there are.
    """

    def __init__(self, windows: Mixture, batch_size: int, rows: Sequence[int], first_batch: int):
        self.windows, self.batch_size, self.rows, self.first_batch = windows, batch_size, rows, first_batch

    def __len__(self) -> int:
        return (len(self.windows) // self.batch_size - self.first_batch) * len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Row ``index`` of those of this process."""
        batch, row = divmod(index, len(self.rows))
        return self.windows[(self.first_batch + batch) * self.batch_size + self.rows[row]]
