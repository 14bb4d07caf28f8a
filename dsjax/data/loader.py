"""Batches: windows of the token stream, shuffled for training and in order for evaluation."""

import dataclasses

import grain
import numpy as np

from dsjax.config import ConfigError
from dsjax.data.preparation import PreparedData
from dsjax.data.store import TokenStore
from dsjax.data.windows import Batch, empty_batch


@dataclasses.dataclass(frozen=True)
class Windows:
    """Random access to windows of ``sequence_length + 1`` tokens, ``sequence_length`` apart.

    A window begins at the last token of the one before, so every token is a target once; the last few, which
    fill no window, are left out. Windows cross documents; isolated, a document is a segment of its own with
    positions from 0, and no loss falls on predicting the next document's start.
    """

    store: TokenStore
    sequence_length: int
    isolate_documents: bool

    def __len__(self) -> int:
        return (len(self.store.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> Batch:
        """The window ``index``; the one after the last whole one may be asked for, and is shorter."""
        first = index * self.sequence_length
        span = self.store.tokens[first : first + self.sequence_length + 1].astype(np.int32)
        begins = np.zeros(len(span), bool)
        if self.isolate_documents:
            starts = self.store.document_starts
            low, high = np.searchsorted(starts, [first + 1, first + len(span)])
            begins[starts[low:high] - first] = True
        order = np.arange(len(span), dtype=np.int32)
        return Batch(
            tokens=span[:-1],
            targets=span[1:],
            segment_ids=(1 + np.cumsum(begins, dtype=np.int32))[:-1],
            positions=(order - np.maximum.accumulate(np.where(begins, order, 0)))[:-1],
            loss_mask=1 - begins[1:].astype(np.float32),
        )


def train_batches(
    prepared: PreparedData, *, batch_size: int, sequence_length: int, isolate_documents: bool, seed: int
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, prefetched; each epoch is every window once, in an order of its own.

    ``get_state`` and ``set_state`` resume with exactly the next batch, given the same arguments.

    Errors: ConfigError if the training text does not fill one batch.
    """
    windows = Windows(prepared.train, sequence_length, isolate_documents)
    if len(windows) < batch_size:
        raise ConfigError(
            f"train.batch_size={batch_size} sequences of train.sequence_length={sequence_length} tokens need "
            f"{batch_size * sequence_length + 1} training tokens and data.paths has "
            f"{len(prepared.train.tokens)}: name more text, or use smaller batches or shorter sequences"
        )
    # Grain adds the epoch to the seed: without this, seed 1 would begin with the second epoch of seed 0.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # Endless, but for the length that grain computes: repeat() without a number overflows with batches of 1.
    epochs = (1 << 62) // len(windows)
    dataset = grain.MapDataset.source(windows).shuffle(shuffle_seed).repeat(epochs).batch(batch_size)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def heldout_batches(
    prepared: PreparedData, *, batch_size: int, sequence_length: int, isolate_documents: bool, batches: int
) -> list[Batch]:
    """At most ``batches`` batches of held-out text, always the same, spread evenly over it.

    Where there is less text there are fewer; what is missing from the last window and the last batch is
    padding, with segment 0 and no loss.
    """
    windows = Windows(prepared.heldout, sequence_length, isolate_documents)
    available = -(-(len(prepared.heldout.tokens) - 1) // sequence_length)
    count = min(available, batches * batch_size)
    rows = [windows[number * available // count] for number in range(count)]
    shape, pad_id = (batch_size, sequence_length), prepared.tokenizer.pad_id
    return [_padded(rows[first : first + batch_size], shape, pad_id) for first in range(0, count, batch_size)]


def _padded(rows: list[Batch], shape: tuple[int, int], pad_id: int) -> Batch:
    """Stacks windows that may be too short or too few for ``shape``."""
    batch = empty_batch(shape, pad_id)
    for number, row in enumerate(rows):
        for name in batch:
            batch[name][number, : len(row[name])] = row[name]
    return batch
