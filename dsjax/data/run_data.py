"""The data of a run: sets prepared before, or one made from ``data.paths`` in the workdir."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dsjax.config import ConfigError, DataConfig
from dsjax.data.engines import Bar, run_here
from dsjax.data.files import whole_file
from dsjax.data.preparation import prepare_set
from dsjax.data.prepared_set import PreparedSet, open_set
from dsjax.data.settings import Names, Settings
from dsjax.data.tokenizer import Tokenizer, load_tokenizer

_PROGRESS_SECONDS = 5.0
_OF_A_RUN = Names(prefix="data.", inputs="data.paths", vocab_size="model.vocab_size")

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run trains on: sets with their weights, and the tokenizer that they share.

    ``fingerprint`` is of everything that training sees.
    """

    tokenizer: Tokenizer
    sets: tuple[PreparedSet, ...]
    weights: tuple[float, ...]
    fingerprint: str


def data_of_run(
    config: DataConfig,
    *,
    vocab_size: int,
    workdir: str | Path,
    tokenizer: Path | None = None,
    log: Log = print,
) -> RunData:
    """The sets of ``data.sets``, or the one in ``workdir/data``, made from ``data.paths`` where it is not there yet.

    ``tokenizer`` is a file to use where ``config`` names none; without either, one is trained on the text. Once the set
    is there, the text is not looked at again.

    Errors: ConfigError for text, tokenizer, vocabulary or sets that cannot be used, for a workdir that was prepared
    otherwise, and for a damaged set.
    """
    folder = Path(workdir).expanduser() / "data"
    if config.sets:
        data = _given_sets(config, vocab_size, folder)
    else:
        data = _own_set(config, vocab_size, folder, tokenizer, log)
    for part in data.sets:
        counts = part.manifest["counts"]
        log(
            f"data: {counts['train']['tokens']:,} training tokens of "
            f"{counts['train']['bytes'] / max(counts['train']['tokens'], 1):.2f} bytes, "
            f"{counts['heldout']['tokens']:,} held out, in {part.folder}"
        )
    return data


def _own_set(config: DataConfig, vocab_size: int, folder: Path, kept: Path | None, log: Log) -> RunData:
    """From text as it is: what is fit to be trained on is the user's choice here."""
    settings = Settings(
        inputs=config.paths,
        quality="none",
        keep_near_duplicates=True,
        heldout_fraction=config.heldout_fraction,
        tokenizer=config.tokenizer,
        vocab_size=vocab_size,
    )
    given = None
    if kept and not config.tokenizer:
        given = load_tokenizer(kept, called=f"{kept}, the tokenizer that came with the weights,")
    began, there = time.monotonic(), (folder / "manifest.json").exists()
    prepare_set(folder, settings, lambda plan: run_here(plan, _watch(log)), names=_OF_A_RUN, given=given)
    made = open_set(folder)
    if given and given.definition != made.tokenizer.definition:
        raise ConfigError(f"{folder} was prepared with another tokenizer than {kept}: use another workdir")
    if not there:
        _tell(made, time.monotonic() - began, log)
    return only(made)


def only(part: PreparedSet) -> RunData:
    """The data of a run on one set."""
    return RunData(part.tokenizer, (part,), (1.0,), part.manifest["fingerprint"])


def _given_sets(config: DataConfig, vocab_size: int, folder: Path) -> RunData:
    sets = [open_set(Path(path).expanduser()) for path, _ in config.weighted_sets()]
    tokenizer = sets[0].tokenizer
    for other in sets[1:]:
        if other.tokenizer.definition != tokenizer.definition:
            raise ConfigError(
                f"data.sets: {sets[0].folder} and {other.folder} have different tokenizers: prepare all with "
                "--tokenizer of one"
            )
    tokenizer.check_fits(vocab_size)
    # Where exports and evaluation look for it, whatever becomes of the sets.
    path = folder / "tokenizer.json"
    if not path.exists() or path.read_bytes() != tokenizer.definition.encode():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            tokenizer.save(unfinished)
    weights = [weight for _, weight in config.weighted_sets()]
    whole = hashlib.blake2b(digest_size=16)
    for part, weight in zip(sets, weights, strict=True):
        whole.update(f"{part.manifest['fingerprint']} {weight}".encode())
    return RunData(tokenizer, tuple(sets), tuple(weights), whole.hexdigest())


def _tell(made: PreparedSet, seconds: float, log: Log) -> None:
    counts = made.manifest["counts"]["read"]
    log(f"data: {counts['documents']} documents, {counts['bytes'] / 1e6:.1f} MB, prepared in {seconds:.1f} s")
    told = set()
    with (made.folder / "rejects.jsonl").open(encoding="utf-8") as file:
        for reject in map(json.loads, file):
            if (reason := reject["reason"]) not in told:
                told.add(reason)
                count = made.manifest["rejected"][reason]
                log(f"data: left out {count}: {reason}, such as {reject['name']} ({reject['sample'][:60]!r})")


class _LogBar:
    """A line every few seconds, and none for what takes less."""

    def __init__(self, doing: str, size_bytes: int, log: Log):
        self._doing, self._size_bytes, self._log = doing, size_bytes, log
        self._done = 0
        self._last = time.monotonic()

    def advance(self, size_bytes: int, *, was_there: bool = False) -> None:
        self._done += size_bytes
        if time.monotonic() - self._last >= _PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._log(f"data: {self._doing}, {self._done / 1e6:.1f} of {self._size_bytes / 1e6:.1f} MB")


def _watch(log: Log) -> Callable[[str, int], contextlib.AbstractContextManager[Bar]]:
    @contextlib.contextmanager
    def watch(doing: str, size_bytes: int) -> Iterator[Bar]:
        yield _LogBar(doing, size_bytes, log)

    return watch
