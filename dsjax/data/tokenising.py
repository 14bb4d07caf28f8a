"""Third and fourth stage: a tokenizer, if none is given, and the shards of tokens."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from dsjax.data.cleaning import Cleaned
from dsjax.data.files import hash_of_files, whole_file, write_json
from dsjax.data.plan import Plan
from dsjax.data.selection import HELDOUT, REPEATED, TRAIN, load_sides
from dsjax.data.shards import ShardWriter, shard_files
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SIDES = {"train": TRAIN, "heldout": HELDOUT}

# A tokenizer is trained on as much text as settles its merges: for 4096 ids 8 MB, which take 3 s on two cores.
_SAMPLE_BYTES_PER_ID = 2048
_LEAST_SAMPLE_BYTES = 8 << 20
_SAMPLE_BLOCK_BYTES = 1 << 16
# A long text is tokenised in pieces of about so many characters, each ended by a line break where there is one; and
# so many characters or texts together, which keeps cores busy.
PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS, _BATCH_PIECES = 1 << 22, 1024


def make_tokenizer(plan: Plan) -> None:
    """Writes ``tokenizer.json``: the one that was given, or one that is trained on a sample of the training text."""
    given, made = plan.work / "tokenizer.json", plan.folder / "tokenizer.json"
    if given.exists():
        tokenizer = load_tokenizer(given)
    else:
        # Names of settings are the caller's; that there is a size was checked when the work began.
        tokenizer = train_tokenizer(_sample(plan), plan.settings.vocab_size)
    with whole_file(made) as unfinished:
        tokenizer.save(unfinished)


def _sample(plan: Plan) -> Iterator[str]:
    """Blocks of training text drawn evenly, always the same."""
    sides = load_sides(plan)
    most_bytes = max(_LEAST_SAMPLE_BYTES, plan.settings.vocab_size * _SAMPLE_BYTES_PER_ID)
    cleaned = [Cleaned(plan, task) for task in range(len(plan.tasks))]
    sizes = np.where(sides.side == TRAIN, np.concatenate([task.sizes for task in cleaned]), 0)
    counts = -(-sizes // _SAMPLE_BLOCK_BYTES)
    owners, firsts = np.repeat(np.arange(len(sizes)), counts), np.cumsum(counts) - counts
    starts = (np.arange(len(owners)) - firsts[owners]) * _SAMPLE_BLOCK_BYTES
    drawn = np.random.default_rng(plan.settings.seed).permutation(len(owners))
    drawn_bytes = np.cumsum(np.minimum(sizes[owners[drawn]] - starts[drawn], _SAMPLE_BLOCK_BYTES))
    drawn = np.sort(drawn[: int(np.searchsorted(drawn_bytes, most_bytes)) + 1])  # each text is read once
    for task, own in enumerate(cleaned):
        first, last = np.searchsorted(owners[drawn], sides.firsts[task : task + 2])
        documents, which = np.unique(owners[drawn[first:last]], return_inverse=True)
        for number, text in enumerate(own.texts(documents - sides.firsts[task])):
            if sides.cut_tails:
                text = text[: tail_start(text, plan.settings.heldout_fraction)]
            encoded = text.encode()
            for start in starts[drawn[first:last][which == number]].tolist():
                # A block's ends may fall inside a character, which then counts for neither block.
                yield encoded[start : start + _SAMPLE_BLOCK_BYTES].decode(errors="ignore")


def tokenise(plan: Plan, task: int, report: Callable[[int], None]) -> None:
    """Writes a task's shards; ``report`` is told the bytes of text that are done. ``tokens-N.json`` comes last."""
    tokenizer = _tokenizer((plan.folder / "tokenizer.json").read_bytes())
    account: dict[str, Any] = {}
    for side in SIDES:
        name = f"{side}-{task:05}"
        writer = ShardWriter(plan.folder, name)
        documents = tokens = size_bytes = 0
        for text, encoded in _encoded(_texts(plan, task, side), tokenizer):
            writer.append(encoded)
            documents, tokens = documents + 1, tokens + len(encoded)
            done_bytes = len(text.encode())
            size_bytes += done_bytes
            report(done_bytes)
        writer.close()
        hashed = hash_of_files(shard_files(plan.folder, name))
        counts = {"documents": documents, "bytes": size_bytes, "tokens": tokens}
        account[side] = {"name": name, **counts, "blake2b": hashed}
    write_json(plan.work / f"tokens-{task:05}.json", account)


def bytes_to_tokenise(plan: Plan, task: int) -> int:
    """The work of ``tokenise``."""
    return int(Cleaned(plan, task).sizes[load_sides(plan).of(task) != REPEATED].sum())


@functools.lru_cache(1)  # every task of a worker asks
def _tokenizer(definition: bytes) -> Tokenizer:
    return Tokenizer(definition.decode(), source="tokenizer.json")


def _texts(plan: Plan, task: int, side: str) -> Iterator[str]:
    sides, cleaned = load_sides(plan), Cleaned(plan, task)
    if not sides.cut_tails:
        yield from cleaned.texts(np.flatnonzero(sides.of(task) == SIDES[side]))
        return
    for text in cleaned.texts(np.flatnonzero(sides.of(task) == TRAIN)):
        position = tail_start(text, plan.settings.heldout_fraction)
        if part := text[:position] if side == "train" else text[position:]:
            yield part


def tail_start(text: str, heldout_fraction: float) -> int:
    """Where the held-out tail of a text begins: after a line break, if one is no further back than the tail is long."""
    target = int(len(text) * (1 - heldout_fraction))
    earliest = max(0, 2 * target - len(text))
    return text.rfind("\n", earliest, target) + 1 or target


def _encoded(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Int32[np.ndarray, "T"]]]:
    """Each text with its tokens."""
    parts: list[Int32[np.ndarray, "T"]] = []
    for batch in _batches(texts):
        for (text, _), tokens in zip(
            batch, tokenizer.encode_documents([piece for _, piece in batch]), strict=True
        ):
            parts.append(tokens)
            if text is not None:
                yield text, np.concatenate(parts)
                parts = []


def _batches(texts: Iterator[str]) -> Iterator[list[tuple[str | None, str]]]:
    """Pieces of text, the last of each with the whole text, in lists that are tokenised together."""
    batch: list[tuple[str | None, str]] = []
    characters = 0
    for text in texts:
        pieces = list(_pieces(text))
        for piece in pieces:
            batch.append((None, piece))
            characters += len(piece)
        batch[-1] = (text, pieces[-1])
        if len(batch) >= _BATCH_PIECES or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        line_break = text.rfind("\n", start, start + PIECE_CHARACTERS)
        stop = line_break + 1 if line_break >= 0 else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
