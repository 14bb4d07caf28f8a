"""First stage: files are read, their texts normalised and filtered; what is left of a task stands in ``work/``.

``clean-N.array_record`` has the texts in UTF-8, one a record; ``clean-N.npz`` what is compared of them;
``clean-N.json``, written last, the account.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int64, UInt8, UInt32

from dsjax.config import ConfigError
from dsjax.data.files import whole_file, write_json
from dsjax.data.plan import Plan
from dsjax.data.readers import Part, Reject, Text, compression_of, needed, read
from dsjax.data.record_file import RecordFile
from dsjax.data.settings import Settings

SAMPLES = 100  # kept of each reason, of a task and of all
_SAMPLE_CHARACTERS = 300
_BLOCK_BYTES = 8 << 20  # of texts that are read back at a time
DIGEST_BYTES = 16


def normalised(text: str) -> str:
    """The text in Unicode's composed form (NFC), its lines ended by a line feed alone."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


@dataclasses.dataclass
class Account:
    """What became of the texts of a task.

    ``counts``: documents and bytes after each step; ``reasons``: how many were rejected for each; ``samples``: some.
    """

    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    samples: list[Reject] = dataclasses.field(default_factory=list)

    def passed(self, step: str, size_bytes: int) -> None:
        """Counts a document that came through a step."""
        entry = self.counts.setdefault(step, {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += size_bytes

    def reject(self, reject: Reject) -> None:
        """Counts it under its reason, and keeps it if there are few of these."""
        self.reasons[reject.reason] += 1
        if self.reasons[reject.reason] <= SAMPLES:
            self.samples.append(reject._replace(sample=reject.sample[:_SAMPLE_CHARACTERS]))


def clean(plan: Plan, task: int, report: Callable[[int], None]) -> None:
    """Does a task. ``report`` is told the bytes of files that are read."""
    account, facts, settings = Account(), _Facts(), plan.settings
    for step in ("read", "filtered"):
        account.counts[step] = {"documents": 0, "bytes": 0}
    signature = _signature_of(settings)
    path = plan.work / f"clean-{task:05}.array_record"
    writer = RecordFile(path)
    for part in plan.tasks[task]:
        for text in _accepted(plan, part, account):
            encoded = text.text.encode()
            writer.write(encoded)
            facts.append(text.name, encoded, signature(text.text))
        report(part.size_bytes)
    writer.close()
    facts.save(path.with_suffix(".npz"))
    write_json(path.with_suffix(".json"), vars(account))


def _accepted(plan: Plan, part: Part, account: Account) -> Iterator[Text]:
    settings = plan.settings
    reason_of = _filter_for(part, settings)
    _check_stamp(part, plan.work)
    for found in read(part, text_field=settings.text_field, most_bytes=settings.max_document_bytes):
        if isinstance(found, Reject):
            account.reject(found)
            continue
        text = normalised(found.text)
        size_bytes = len(text.encode())
        account.passed("read", size_bytes)
        reason = reason_of(text) if text.strip() else "empty"
        if reason:
            account.reject(Reject(found.name, reason, text))
        else:
            account.passed("filtered", size_bytes)
            yield Text(found.name, text)
    _check_stamp(part, plan.work)


# What these two import is in the extra [data], which a run on one's own text does not need.


def _filter_for(part: Part, settings: Settings) -> Callable[[str], str]:
    if settings.quality == "none":
        return lambda text: ""
    inner = part.path.with_suffix("") if compression_of(part.path) else part.path
    return needed("dsjax.data.filters", "filtering by quality").filter_for(inner.suffix, settings.quality)


def _signature_of(settings: Settings) -> Callable[[str], UInt32[np.ndarray, "256"] | None]:
    if settings.keep_near_duplicates:
        return lambda text: None
    return needed("dsjax.data.near_duplicates", "removing near-duplicates").signature


def _check_stamp(part: Part, work: Path) -> None:
    """Raises ConfigError if the file is not the one that was found: half of it would be of another."""
    try:
        status = part.path.stat()
        same = (status.st_size, status.st_mtime_ns) == part.stamp
    except OSError:
        same = False
    if not same:
        raise ConfigError(
            f"{part.name} changed since the work began: when it stays still, delete {work.parent} and begin again"
        )


class _Facts:
    """What later stages know of texts without reading them."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._digests: list[bytes] = []
        self._signatures: list[UInt32[np.ndarray, "256"]] = []

    def append(self, name: str, encoded: bytes, signature: UInt32[np.ndarray, "256"] | None) -> None:
        self._names.append(name)
        self._sizes.append(len(encoded))
        self._digests.append(hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).digest())
        if signature is not None:
            self._signatures.append(signature)

    def save(self, path: Path) -> None:
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            np.savez(
                file,
                names=np.frombuffer(json.dumps(self._names).encode(), np.uint8),
                sizes=np.array(self._sizes, np.int64),
                digests=np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, DIGEST_BYTES),
                signatures=np.array(self._signatures, np.uint32),
            )


class Cleaned:
    """What ``clean`` left of a task.

    Fields: ``sizes``, bytes of UTF-8 of every text; ``digests`` of them; ``account``.
    """

    def __init__(self, plan: Plan, task: int):
        """Errors: ConfigError, here and in what follows, if it is damaged."""
        self._path = plan.work / f"clean-{task:05}.array_record"
        with not_damaged(self._path):
            self.sizes: Int64[np.ndarray, "D"] = self._stored("sizes")
            self.digests: UInt8[np.ndarray, "D 16"] = self._stored("digests")
            self.account: dict[str, Any] = json.loads(self._path.with_suffix(".json").read_bytes())

    def names(self) -> list[str]:
        """What reports call the documents."""
        return json.loads(self._stored("names").tobytes())

    def signatures(self) -> UInt32[np.ndarray, "D 256"]:
        """What near-duplicates are found by."""
        return self._stored("signatures")

    def _stored(self, name: str) -> Any:
        # Closed again each time: there may be more tasks than files that a process may have open.
        with np.load(self._path.with_suffix(".npz")) as stored:
            return stored[name]

    def texts(self, numbers: Int64[np.ndarray, "N"]) -> Iterator[str]:
        """Documents by number, a few megabytes of them in memory."""
        if not len(numbers):
            return
        blocks = np.cumsum(self.sizes[numbers]) // _BLOCK_BYTES
        edges = [*np.flatnonzero(np.diff(blocks, prepend=-1)), len(numbers)]
        with not_damaged(self._path):
            reader = ArrayRecordReader(str(self._path))
        for first, last in itertools.pairwise(edges):
            with not_damaged(self._path):
                records = reader.read(numbers[first:last].tolist())
                if [len(record) for record in records] != self.sizes[numbers[first:last]].tolist():
                    raise ValueError("it lacks texts")
            for record in records:
                yield record.decode()


@contextlib.contextmanager
def not_damaged(path: Path) -> Iterator[None]:
    """Turns what reading a damaged file in ``work/`` raises into a ConfigError."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path.with_suffix('')} is damaged ({error}): delete {path.parent.parent} to begin again"
        ) from error
