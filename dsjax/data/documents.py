"""What a document looks like as tokens: ``BOS text EOS``, or with its middle moved to the end.

Fill in the middle (PSM): ``BOS <fim_begin> prefix <fim_hole> suffix <fim_end> middle EOS``. Cuts fall between tokens:
so a document's length is known before it is read, and every window of an epoch can be computed.

Source: DeepSeek-Coder §3.2; V3 report §4.1.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Integer

FIM_TOKENS = 3  # more than the document has otherwise
EDGE_TOKENS = 2  # BOS and EOS


class Documents(Protocol):
    """Tokenised texts, read at random."""

    lengths: Integer[np.ndarray, "D"]  # tokens of each text, without control tokens

    def text(self, number: int, start: int, stop: int) -> Int32[np.ndarray, "T"]:
        """Tokens ``start`` to ``stop`` of one text."""
        ...


class Controls(NamedTuple):
    """Ids of the control tokens around and within documents."""

    bos: int
    eos: int
    pad: int
    fim_begin: int
    fim_hole: int
    fim_end: int


class Cut(NamedTuple):
    """Where a document's middle begins and ends, in tokens of its text."""

    start: int
    stop: int


def random_cut(length: int, key: tuple[int, ...]) -> Cut:
    """Any two places, each as likely; the same for the same ``key``."""
    start, stop = sorted(np.random.default_rng(key).integers(0, length + 1, 2).tolist())
    return Cut(start, stop)


def rendered(
    documents: Documents, number: int, cut: Cut | None, controls: Controls, start: int, stop: int
) -> Int32[np.ndarray, "T"]:
    """Tokens ``start`` to ``stop`` of a document with its control tokens; reads no more text than that."""
    parts, position = [], 0
    for part in _layout(int(documents.lengths[number]), cut, controls):
        first, last = max(start - position, 0), min(stop - position, len(part))
        position += len(part)
        if first >= last:
            continue
        if isinstance(part, range):
            parts.append(documents.text(number, part[first], part[first] + last - first))
        else:
            parts.append(np.array(part[first:last], np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _layout(length: int, cut: Cut | None, controls: Controls) -> Iterator[range | tuple[int, ...]]:
    """Control tokens, and ranges of the text."""
    if cut is None:
        yield from ((controls.bos,), range(length), (controls.eos,))
        return
    yield controls.bos, controls.fim_begin
    yield from (range(cut.start), (controls.fim_hole,), range(cut.stop, length), (controls.fim_end,))
    yield from (range(cut.start, cut.stop), (controls.eos,))
