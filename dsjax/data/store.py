"""Token files: all documents one after another, ``BOS document EOS``, and where each begins."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Int32, Int64, UInt32

from dsjax.data.corpus import PIECE_BYTES, Document
from dsjax.data.tokenizer import Tokenizer

# Text that is tokenised at a time: enough to keep every core busy, little beside the model.
_BATCH_PIECES, _BATCH_BYTES = 1024, 16 * PIECE_BYTES


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The token stream of one side of the corpus, read from disk as it is needed."""

    tokens: UInt32[np.ndarray, "N"]
    document_starts: Int64[np.ndarray, "D"]  # positions of the BOS of each document, rising, the first 0


def write_store(
    folder: Path,
    side: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    report: Callable[[int], None],
) -> None:
    """Tokenises documents into ``<side>_tokens.npy`` and ``<side>_starts.npy``.

    ``report`` is told the bytes of text tokenised so far. Memory stays the same however long the text is.
    """
    starts: list[int] = []
    done_bytes = 0
    with _TokenFile(folder / f"{side}_tokens.npy") as file:
        for batch in _batches(documents):
            texts = [text for _, text in batch]
            for (number, _), ids in zip(batch, tokenizer.encode_documents(texts), strict=True):
                if number == len(starts):
                    if starts:
                        file.append([tokenizer.eos_id])
                    starts.append(file.length)
                    file.append([tokenizer.bos_id])
                file.append(ids)
                done_bytes += int(tokenizer.token_bytes[ids].sum())
            report(done_bytes)
        file.append([tokenizer.eos_id])
    np.save(folder / f"{side}_starts.npy", np.array(starts, np.int64))


def load_store(folder: Path, side: str) -> TokenStore:
    """Opens what ``write_store`` wrote. Errors: OSError or ValueError if it is missing or cut short."""
    tokens = np.load(folder / f"{side}_tokens.npy", mmap_mode="r")
    return TokenStore(tokens, np.load(folder / f"{side}_starts.npy"))


def _batches(documents: Sequence[Document]) -> Iterator[list[tuple[int, str]]]:
    """Pieces of text with the number of their document, in lists that are tokenised together."""
    pieces = ((number, text) for number, document in enumerate(documents) for text in document.pieces())
    batch: list[tuple[int, str]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if len(batch) >= _BATCH_PIECES or characters >= _BATCH_BYTES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _TokenFile:
    """A uint32 ``.npy`` file that grows: the length in its header is set when it is closed."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self.length = 0
        self._write_header()

    def append(self, ids: Sequence[int] | Int32[np.ndarray, "T"]) -> None:
        self._file.write(np.asarray(ids, "<u4").tobytes())
        self.length += len(ids)

    def _write_header(self) -> None:
        # The format leaves room for the first axis to grow: the header's size does not depend on the length.
        header = {"descr": "<u4", "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "_TokenFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()
