"""The weights, and the tokenizer, that a run begins with."""

import contextlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax

from dsjax.checkpoint.companions import copy_kept, keep_companions
from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_checkpoint import HfCheckpoint, open_sound_checkpoint
from dsjax.checkpoint.hf_config import differences, with_new_indexer
from dsjax.checkpoint.hf_load import load_arrays
from dsjax.checkpoint.model_folder import HF, ModelFolder, open_model_folder
from dsjax.checkpoint.store import (
    CheckpointStore,
    DamagedError,
    from_named_leaves,
    named_leaves,
    placed,
)
from dsjax.checkpoint.stored_arrays import StoredModel
from dsjax.config import ConfigError, ModelConfig, RunConfig
from dsjax.config.fields import spell
from dsjax.models.transformer import Transformer

Initial = HfCheckpoint | ModelFolder  # the weights that a run begins with, not yet read


def open_initial(config: RunConfig, workdir: Path) -> Initial | None:
    """What ``init`` names, None for random weights; reads no weights.

    What came with them, the tokenizer among it, is kept in ``WORKDIR/hf``: the run never needs its source again.

    Raises ConfigError where they are missing, unsound or of another model, and where the folder holds what came with
    others.
    """
    with _named(config):
        opened = _opened(config)
        _keep(opened, workdir)
    return opened


def kept_tokenizer(workdir: Path) -> Path | None:
    """The tokenizer that came with the weights the run began with."""
    path = workdir / HF / "tokenizer.json"
    return path if path.exists() else None


def initial_model(config: RunConfig, initial: Initial, target: Transformer) -> Transformer:
    """Reads the weights with the dtypes and shardings of the abstract ``target``.

    Raises ConfigError where they are damaged.
    """
    with _named(config):
        if isinstance(initial, HfCheckpoint):
            return from_named_leaves(target, dict(load_arrays(initial, placed(named_leaves(target)))))
        store = CheckpointStore(initial.path, keep=None)
        try:
            return store.restore_part(int(initial.step.name), target, prefix="model")
        except DamagedError as error:
            raise CheckpointError(f"{error.what}: make it again, or begin with another") from error
        finally:
            store.close()


@contextlib.contextmanager
def _named(config: RunConfig) -> Iterator[None]:
    """Errors begin with the field that names the weights."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"init.{'hf' if config.init.hf else 'checkpoint'}: {error}") from error


def _opened(config: RunConfig) -> Initial | None:
    init = config.init
    if init.hf:
        opened = open_sound_checkpoint(Path(init.hf).expanduser())
        if init.new_indexer:
            opened = opened._replace(config=with_new_indexer(opened.config, like=config.model))
        _check_same_model(config.model, opened.config.model, opened.directory)
        return opened
    if init.checkpoint:
        folder = open_model_folder(Path(init.checkpoint).expanduser())
        _check_same_model(config.model, folder.model, folder.path)
        if jax.process_index() == 0:
            StoredModel(folder.step, folder.model)  # finds what is missing before the text is prepared
        return folder
    return None


def _keep(opened: Initial | None, workdir: Path) -> None:
    """Several processes may do so at a time: the folder appears whole, and the first one's serves all.

    What an earlier start kept is replaced, and nothing that was not kept by one.
    """
    kept, record = workdir / HF, workdir / ".hf.json"
    with tempfile.TemporaryDirectory(prefix=".hf-", dir=workdir) as temporary:
        made = Path(temporary) / HF
        made.mkdir()
        if isinstance(opened, HfCheckpoint):
            keep_companions(opened.directory, made, opened.config.values)
        elif opened:
            copy_kept(opened, made)
        digests = _digests(made)
        if kept.exists() and not _holds(kept, digests):
            if not record.exists() or not _holds(kept, json.loads(record.read_text())):
                raise ConfigError(
                    f"{kept} is where a run keeps what came with its first weights, and holds something else: use "
                    f"another --workdir, or move it and {workdir / 'data'} away"
                )
            shutil.rmtree(kept)
        if digests and not kept.exists():
            record.write_text(json.dumps(digests))
            try:
                made.rename(kept)
            except OSError:
                if not kept.exists():  # otherwise another process was first
                    raise


def _holds(folder: Path, digests: dict[str, int]) -> bool:
    """Whether it holds these files and no others; looks at names first, since it may be anything."""
    return sorted(path.name for path in folder.iterdir()) == sorted(digests) and _digests(folder) == digests


def _digests(folder: Path) -> dict[str, int]:
    return {path.name: zlib.crc32(path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def _check_same_model(ours: ModelConfig, theirs: ModelConfig, path: Path) -> None:
    found = list(differences(ours, theirs))
    if found:
        name, mine, other = found[0]
        flags = " ".join(f"--config.model.{name}={spell(value)}" for name, _, value in found)
        raise ConfigError(
            f"model.{name}={spell(mine)} differs from the {spell(other)} of {path}: for that model use {flags}"
        )
