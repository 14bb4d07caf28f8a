"""Batches of a run: windows of its sets, mixed and shuffled for training, always the same for evaluation."""

from collections.abc import Sequence

import grain
import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.documents import Controls
from dsjax.data.mixture import Mixture, ProcessRows
from dsjax.data.run_data import RunData
from dsjax.data.token_set import TokenSet
from dsjax.data.tokenizer import Tokenizer
from dsjax.data.windows import Batch, ConcatWindows, PackedWindows, Shape, empty_batch

Windows = ConcatWindows | PackedWindows


def train_windows(data: RunData, config: DataConfig, *, sequence_length: int, seed: int) -> Mixture:
    """The endless row of windows that training reads, each of ``sequence_length`` tokens.

    Errors: ConfigError for a tokenizer that cannot do what ``config`` wants.
    """
    windows = []
    for place, part in enumerate(data.sets):
        # Sets that hold the same documents must not show them in the same order.
        own_seed = int(np.random.SeedSequence((seed, place)).generate_state(1)[0])
        shape = Shape(sequence_length, config.isolate_documents, config.fim_rate, own_seed)
        windows.append(_windows(part.train, config, shape, data.tokenizer))
    return Mixture(windows, data.weights)


def train_batches(
    windows: Mixture, *, batch_size: int, rows: Sequence[int] | None = None, first_batch: int = 0
) -> grain.DatasetIterator[Batch]:
    """Endless training batches, prefetched, from ``first_batch`` on; of each, the ``rows`` of one process, or all.

    A batch follows from its number: a run that goes on after step n begins with batch n, in however many processes.
    """
    rows = range(batch_size) if rows is None else rows
    dataset = grain.MapDataset.source(ProcessRows(windows, batch_size, rows, first_batch)).batch(len(rows))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def heldout_batches(
    data: RunData, config: DataConfig, *, batch_size: int, sequence_length: int, batches: int
) -> list[Batch]:
    """At most ``batches`` batches of held-out text, always the same, spread evenly over the sets' windows.

    Where there is less text there are fewer, and what is missing from the last is padding. Nothing is moved.
    """
    shape = Shape(sequence_length, config.isolate_documents, fim_rate=0.0, seed=0)
    every = [_windows(part.heldout, config, shape, data.tokenizer) for part in data.sets]
    places = [(own, number) for own in every for number in range(own.count)]
    count = min(len(places), batches * batch_size)
    chosen = (places[number * len(places) // count] for number in range(count))
    rows = [own.window(0, number) for own, number in chosen]
    missing = -len(rows) % batch_size
    rows += [empty_batch((sequence_length,), data.tokenizer.pad_id)] * missing
    return [_stacked(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


def _windows(documents: TokenSet, config: DataConfig, shape: Shape, tokenizer: Tokenizer) -> Windows:
    kind = ConcatWindows if config.packing == "concat" else PackedWindows
    return kind(documents, shape, controls_of(tokenizer, config.fim_rate))


def controls_of(tokenizer: Tokenizer, fim_rate: float) -> Controls:
    """Ids of the tokens around and within documents; those for filling in may lack where nothing is moved."""
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    if not fim_rate:
        return Controls(bos, eos, pad, -1, -1, -1)
    try:
        moved = [tokenizer.id_of(f"<｜fim▁{name}｜>") for name in ("begin", "hole", "end")]
    except ConfigError as error:
        raise ConfigError(f"data.fim_rate={fim_rate}: {error}, or data.fim_rate=0") from None
    return Controls(bos, eos, pad, *moved)


def _stacked(rows: list[Batch]) -> Batch:
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in Batch.__annotations__})
