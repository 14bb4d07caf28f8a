"""Second stage: which documents are kept, and which of them are held out; ``work/sides.npz`` and ``sides.json``."""

import functools
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int64, UInt8

from dsjax.config import ConfigError
from dsjax.data.cleaning import SAMPLES, Account, Cleaned, not_damaged
from dsjax.data.files import whole_file, write_json
from dsjax.data.plan import Plan
from dsjax.data.readers import Reject, needed

TRAIN, HELDOUT, REPEATED = 0, 1, -1
_MOST_OF_ONE = 0.2  # of all text, that one document may take to the held-out side
_LEAST_BYTES_TO_CUT = 8  # of a text that has two characters for sure


class Sides(NamedTuple):
    """The documents of all tasks, in order, and what becomes of them.

    ``side``: ``TRAIN``, ``HELDOUT``, or ``REPEATED`` for those that repeat an earlier one. ``cut_tails``: every
    document is for training but for its tail, as the hash would have left one side without any. ``firsts``: number of
    each task's first document, and of all documents.
    """

    side: Int8[np.ndarray, "D"]
    cut_tails: bool
    firsts: Int64[np.ndarray, "N+1"]

    def of(self, task: int) -> Int8[np.ndarray, "D"]:
        """Those of a task."""
        return self.side[self.firsts[task] : self.firsts[task + 1]]


def load_sides(plan: Plan) -> Sides:
    """What ``select`` decided."""
    path = plan.work / "sides.npz"
    with not_damaged(path), np.load(path) as stored:
        return Sides(stored["side"], bool(stored["cut_tails"]), stored["firsts"])


def select(plan: Plan, report: Callable[[int], None]) -> None:
    """Removes what repeats an earlier document, word for word or nearly, and holds some documents out.

    A document is held out by a hash of its text alone, so that other files do not move it across.

    Errors: ConfigError where no document is left.
    """
    account = Account()
    cleaned = [Cleaned(plan, task) for task in range(len(plan.tasks))]
    firsts = np.concatenate([[0], np.cumsum([len(task.sizes) for task in cleaned], dtype=np.int64)])
    digests, sizes = (
        np.concatenate([getattr(task, name) for task in cleaned]) for name in ("digests", "sizes")
    )
    if not len(sizes):
        raise _useless(plan, cleaned)
    repeated = _first_equal(digests)
    _account_for(account, "exact duplicate", repeated, cleaned, firsts)
    account.counts["without_exact_duplicates"] = _count(sizes[repeated < 0])
    if not plan.settings.keep_near_duplicates:
        near = _first_alike(cleaned, repeated, sizes, report)
        _account_for(account, "near-duplicate", near, cleaned, firsts)
        repeated = np.maximum(repeated, near)
        account.counts["without_near_duplicates"] = _count(sizes[repeated < 0])
    side = _sides(digests, np.where(repeated < 0, sizes, 0), plan)
    cut_tails = not np.any(side == HELDOUT)
    if cut_tails and sizes[side == TRAIN].max() < _LEAST_BYTES_TO_CUT:
        raise _useless(plan, cleaned)
    path = plan.work / "sides.npz"
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, side=side, cut_tails=cut_tails, firsts=firsts)
    write_json(path.with_suffix(".json"), vars(account))


def bytes_to_compare(plan: Plan) -> int:
    """The work of ``select``."""
    if plan.settings.keep_near_duplicates:
        return 0
    return sum(int(Cleaned(plan, task).sizes.sum()) for task in range(len(plan.tasks)))


def _sides(
    digests: UInt8[np.ndarray, "D 16"], sizes: Int64[np.ndarray, "D"], plan: Plan
) -> Int8[np.ndarray, "D"]:
    """By the first 8 bytes of the hash, which another seed reads in another way; documents without size repeat others.

    Where that holds out no document, or all, it is one that has at least half of the wanted share of the text and at
    most a fifth of it all, if there is one; else none.
    """
    numbers = digests[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)
    if plan.settings.seed:
        # Odd, so that it permutes the numbers; their high bits come to depend on all others.
        numbers *= np.random.default_rng(plan.settings.seed).integers(2**64, dtype=np.uint64) | np.uint64(1)
    heldout = numbers < plan.settings.heldout_fraction * 2.0**64
    kept = sizes > 0
    if not np.any(heldout & kept) or np.all(heldout[kept]):
        least = plan.settings.heldout_fraction / 2
        fitting = np.flatnonzero((sizes >= least * sizes.sum()) & (sizes <= _MOST_OF_ONE * sizes.sum()))
        heldout = np.zeros(len(sizes), bool)
        heldout[fitting[np.argsort(numbers[fitting])[:1]]] = True
    return np.where(kept, np.where(heldout, HELDOUT, TRAIN), REPEATED).astype(np.int8)


def _first_equal(digests: UInt8[np.ndarray, "D 16"]) -> Int64[np.ndarray, "D"]:
    """For each document the number of the first with the same text, or -1 if it is that."""
    whole = np.ascontiguousarray(digests).view("V16")[:, 0]
    _, first, which = np.unique(whole, return_index=True, return_inverse=True)
    return np.where(first[which] < np.arange(len(whole)), first[which], -1)


def _first_alike(
    cleaned: list[Cleaned],
    repeated: Int64[np.ndarray, "D"],
    sizes: Int64[np.ndarray, "D"],
    report: Callable[[int], None],
) -> Int64[np.ndarray, "D"]:
    """The same for those that nearly repeat one; what has the text of another is not looked at."""
    repeats = needed("dsjax.data.near_duplicates", "removing near-duplicates").repeats
    kept = np.flatnonzero(repeated < 0)

    def signatures() -> Iterator[object]:
        every = itertools.chain.from_iterable(task.signatures() for task in cleaned)
        for number, signature in enumerate(every):
            if repeated[number] < 0:
                yield signature
            report(int(sizes[number]))

    found = np.array(repeats(signatures()), np.int64)
    alike = np.full(len(repeated), -1)
    alike[kept] = np.where(found >= 0, kept[found], -1)
    return alike


def _count(sizes: Int64[np.ndarray, "D"]) -> dict[str, int]:
    return {"documents": len(sizes), "bytes": int(sizes.sum())}


def _account_for(
    account: Account,
    reason: str,
    repeated: Int64[np.ndarray, "D"],
    cleaned: list[Cleaned],
    firsts: Int64[np.ndarray, "N+1"],
) -> None:
    """Counts what is repeated, and names some with what they repeat."""
    account.reasons[reason] = int(np.count_nonzero(repeated >= 0))

    names = functools.cache(lambda task: cleaned[task].names())

    def name(number: int) -> str:
        task = int(np.searchsorted(firsts, number, "right")) - 1
        return names(task)[number - int(firsts[task])]

    for number in np.flatnonzero(repeated >= 0)[:SAMPLES].tolist():
        account.samples.append(Reject(name(number), reason, f"repeats {name(int(repeated[number]))}"))


def _useless(plan: Plan, cleaned: list[Cleaned]) -> ConfigError:
    """For text of which nothing can be used; what was done is removed, for nobody will go on with it."""
    reasons, samples = Counter(reject.reason for reject in plan.rejects), list(plan.rejects)
    for task in cleaned:
        reasons.update(task.account["reasons"])
        samples += (Reject(*fields) for fields in task.account["samples"])
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    such_as = (
        f", such as {samples[0].name}: {samples[0].reason} {samples[0].sample[:60]!r}" if samples else ""
    )
    shutil.rmtree(plan.work)
    return ConfigError(
        f"no usable text in {','.join(plan.settings.inputs)} ({told or 'it is too short'}{such_as}): "
        "name other text, or other filters"
    )
