"""Text to token files, once a workdir: what every later start and every batch reads."""

import dataclasses
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError, DataConfig
from dsjax.data.corpus import Corpus, read_corpus
from dsjax.data.split import sample, split
from dsjax.data.store import TokenStore, load_store, write_store
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

# Merges settle long before this; training on it takes about 3 s on two cores.
_TOKENIZER_SAMPLE_BYTES = 8 << 20
_PROGRESS_SECONDS = 5.0
_ABANDONED_SECONDS = 3600.0
_SIDES = ("train", "heldout")
# Raised by whoever changes what the files hold, so that old ones are refused instead of misread.
_MADE_BY = "dsjax.data 1"

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A tokenizer, the tokens of the training and of the held-out text, and the account of their making.

    ``manifest``: ``config``, the fields that decided the content; ``documents``, ``bytes`` and ``tokens``,
    each by side; ``skipped``, name and reason; ``fingerprint`` of the names and contents of the files.
    """

    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore
    manifest: dict[str, Any]


def prepare(
    config: DataConfig,
    *,
    vocab_size: int,
    workdir: str | Path,
    tokenizer: Path | None = None,
    log: Log = print,
) -> PreparedData:
    """The data of a run: read from ``workdir/data`` if it is there, else made from the text and kept there.

    ``tokenizer`` is a file to use where ``config`` names none; without either, one is trained on the text.
    The folder appears complete or not at all, whenever the process is stopped, and several processes may
    prepare the same workdir at a time. Once it is there, the text is not looked at again.

    Errors: ConfigError for text, tokenizer or vocabulary that cannot be used, for a workdir that was prepared
    otherwise, and for one that is damaged.
    """
    workdir = Path(workdir).expanduser()
    folder = workdir / "data"
    identity = _identity(config, tokenizer, vocab_size)
    _remove_abandoned(workdir)
    if not folder.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f".data-{uuid.uuid4().hex[:12]}"
        temporary.mkdir()
        try:
            _write(config, tokenizer, identity, temporary, log)
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _load(identity, folder, log)


def _write(config: DataConfig, kept: Path | None, identity: dict[str, Any], folder: Path, log: Log) -> None:
    began, vocab_size = time.monotonic(), identity["model.vocab_size"]
    tokenizer = None
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    elif kept:
        tokenizer = load_tokenizer(kept, called=f"{kept}, the tokenizer that came with the weights,")
    if tokenizer:
        tokenizer.check_fits(vocab_size)
    corpus = read_corpus(config.paths)
    sides = dict(zip(_SIDES, split(corpus, config.heldout_fraction), strict=True))
    log(f"data: {len(corpus.documents)} documents, {_megabytes(corpus.size_bytes)}")
    _log_skipped(corpus, log)
    if tokenizer is None:
        tokenizer = train_tokenizer(sample(sides["train"], _TOKENIZER_SAMPLE_BYTES), vocab_size)
        log(f"data: trained a tokenizer of {tokenizer.vocab_size} ids")
    tokenizer.save(folder / "tokenizer.json")
    for side, documents in sides.items():
        total_bytes = sum(document.size_bytes for document in documents)
        write_store(folder, side, documents, tokenizer, _progress(side, total_bytes, log))
    manifest = {
        "made_by": _MADE_BY,
        "config": identity,
        "documents": {side: len(documents) for side, documents in sides.items()},
        "bytes": {side: sum(item.size_bytes for item in documents) for side, documents in sides.items()},
        "tokens": {side: len(load_store(folder, side).tokens) for side in _SIDES},
        "skipped": [dataclasses.asdict(item) for item in corpus.skipped],
        "fingerprint": corpus.fingerprint,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    log(f"data: prepared in {time.monotonic() - began:.1f} s")


def _load(identity: dict[str, Any], folder: Path, log: Log) -> PreparedData:
    manifest = _read_manifest(folder)
    _check_same(manifest["config"], identity, folder)
    tokens, size_bytes = manifest["tokens"], manifest["bytes"]["train"]
    try:
        definition = (folder / "tokenizer.json").read_bytes().decode("utf-8")
        stores = {side: load_store(folder, side) for side in _SIDES}
        for side, store in stores.items():
            if len(store.tokens) != tokens[side]:
                raise ValueError(f"{len(store.tokens)} {side} tokens instead of {tokens[side]}")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{folder} is damaged ({error}): delete it, and the next start prepares it again"
        ) from error
    log(
        f"data: {tokens['train']:,} training tokens of {size_bytes / tokens['train']:.2f} bytes, "
        f"{tokens['heldout']:,} held out, in {folder}"
    )
    tokenizer = Tokenizer(definition, source=str(folder / "tokenizer.json"))
    return PreparedData(tokenizer, stores["train"], stores["heldout"], manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ConfigError for a folder that something else made, perhaps the user's text itself."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["made_by"] != _MADE_BY:
            raise ValueError(f"it was made by {manifest['made_by']}")
        if missing := {"config", "tokens", "bytes", "fingerprint"} - manifest.keys():
            raise ValueError(f"its manifest lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is where prepared data are kept and holds something else ({error!r}): "
            "use another workdir, or delete the folder if nothing else is in it"
        ) from error
    return manifest


def _identity(config: DataConfig, tokenizer: Path | None, vocab_size: int) -> dict[str, Any]:
    """The settings that decide what is in the folder, by the name that the user knows them by."""
    kept = f"that of the weights, {zlib.crc32(tokenizer.read_bytes()):08x}" if tokenizer else ""
    return {
        "data.paths": list(config.paths),
        "data.tokenizer": config.tokenizer or kept,
        "data.heldout_fraction": config.heldout_fraction,
        "model.vocab_size": vocab_size,
    }


def _check_same(prepared: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for name, value in wanted.items():
        if prepared[name] != value:
            raise ConfigError(
                f"{name}={value!r}, and {folder} was prepared with {prepared[name]!r}: use that value, another "
                "workdir, or delete the folder if no run of it is to go on"
            )


def _move(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process was first: what it prepared from the same settings serves as well.
        if not folder.exists():
            raise


def _remove_abandoned(workdir: Path) -> None:
    """Deletes temporary folders that a stopped process left; those of a process at work are recent."""
    for folder in workdir.glob(".data-*"):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            continue  # it was renamed or deleted in this moment
        if time.time() - newest > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _progress(side: str, total_bytes: int, log: Log) -> Callable[[int], None]:
    last = time.monotonic()

    def report(done_bytes: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            log(f"data: tokenised {_megabytes(done_bytes)} of {_megabytes(total_bytes)} ({side})")

    return report


def _log_skipped(corpus: Corpus, log: Log) -> None:
    for item in corpus.skipped[:5]:
        log(f"data: skipped {item.name}: {item.reason}")
    if len(corpus.skipped) > 5:
        log(f"data: skipped {len(corpus.skipped) - 5} more, all listed in manifest.json")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
