"""Which documents are trained on, which are held out, and a sample of them to train a tokenizer on."""

import dataclasses
import random
from collections.abc import Iterator, Sequence

from dsjax.config import ConfigError
from dsjax.data.corpus import Corpus, Document

_SAMPLE_BLOCK_BYTES = 1 << 16


def split(corpus: Corpus, heldout_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, neither empty, both in an order that no file name decides.

    A document is held out by a hash of its content alone, so adding or renaming files moves no other document
    across, and copies stay on one side. Where that leaves a side empty, as with one big file, every document
    gives its last ``heldout_fraction`` instead, cut at a line break.

    Errors: ConfigError if the text is too short to be cut.
    """
    heldout = [document for document in corpus.documents if _is_heldout(document, heldout_fraction)]
    training = [document for document in corpus.documents if not _is_heldout(document, heldout_fraction)]
    if not heldout or not training:
        cut = [(document, _cut_position(document, heldout_fraction)) for document in corpus.documents]
        training = [dataclasses.replace(document, stop=position) for document, position in cut]
        heldout = [dataclasses.replace(document, start=position) for document, position in cut]
        training = [document for document in training if document.size_bytes]
        heldout = [document for document in heldout if document.size_bytes]
    if not heldout or not training:
        raise ConfigError(
            f"data.paths has {corpus.size_bytes} bytes of text, too few to hold any out: name more text"
        )
    # Files of one folder resemble each other: neighbours in a sequence should not.
    random.Random(0).shuffle(training)
    random.Random(0).shuffle(heldout)
    return training, heldout


def sample(documents: Sequence[Document], most_bytes: int) -> Iterator[str]:
    """Blocks of text drawn evenly from all documents, about ``most_bytes`` in all, always the same."""
    blocks = [
        (document, start)
        for document in documents
        for start in range(document.start, document.stop, _SAMPLE_BLOCK_BYTES)
    ]
    random.Random(0).shuffle(blocks)
    taken = 0
    for document, start in blocks:
        if taken >= most_bytes:
            return
        with document.opened() as file:
            file.seek(start)
            block = file.read(min(_SAMPLE_BLOCK_BYTES, document.stop - start))
        taken += len(block)
        # A block's ends may fall inside a character, which then counts for neither block.
        yield block.decode(errors="ignore")


def _is_heldout(document: Document, heldout_fraction: float) -> bool:
    return int.from_bytes(document.digest[:8], "big") < heldout_fraction * 2**64


def _cut_position(document: Document, heldout_fraction: float) -> int:
    """Byte where the held-out tail of a document starts: after a line break, else between two characters."""
    target = document.start + int(document.size_bytes * (1 - heldout_fraction))
    # No further back than the tail is long, so that a file of one long line is not held out whole; three
    # bytes back there is a character's first byte in any case.
    earliest = max(document.start, target - max(document.stop - target, 3))
    with document.opened() as file:
        file.seek(earliest)
        window = file.read(target - earliest + 1)
    line_break = window.rfind(b"\n", 0, target - earliest)
    if line_break >= 0:
        return earliest + line_break + 1
    while target > earliest and window[target - earliest] & 0xC0 == 0x80:
        target -= 1
    return target
