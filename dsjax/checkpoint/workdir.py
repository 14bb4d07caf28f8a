"""The folder of a run, and whose it is."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dsjax.checkpoint.store import has_checkpoint
from dsjax.config import ConfigError, RunConfig, to_dict
from dsjax.config.record import Difference, differences

# What decides the parameters' shapes and which batch comes next: a run cannot go on with another value.
_FIXED = ("model.", "data.", "seed", "train.batch_size", "train.sequence_length", "optimizer.moment_dtype")
# Part of the model's configuration that changes how it is computed, not what.
_FREE = (
    "model.compute_dtype",
    "model.remat",
    "model.scan_layers",
    "model.attention_block_size",
    "model.dense_attention_max_length",
    "model.expert_exchange",
    "model.expert_capacity",
)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes the folder and keeps every other process from training in it, until this one ends however it may.

    Raises ConfigError where it cannot be made or is in use.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be made or written ({error.strerror}): name a folder that you may write to"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--workdir={workdir} is in use by another train.py: wait for its end, or use a new --workdir"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def claim(config: RunConfig, workdir: Path) -> list[str]:
    """Keeps ``config.json`` in the folder; returns what changed since the run began there.

    A run begins with its first checkpoint: until then any field may be corrected.

    Raises ConfigError where the folder holds a run of another model or other data, naming the field.
    """
    changes = changes_since(config, workdir) if has_checkpoint(workdir) else []
    path = workdir / "config.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    os.replace(temporary, path)
    return changes


def changes_since(config: RunConfig, workdir: Path) -> list[str]:
    """How ``config`` differs from the ``config.json`` there; raises as ``claim`` does, and writes nothing."""
    path = workdir / "config.json"
    if not path.exists():
        if has_checkpoint(workdir):
            raise ConfigError(
                f"--workdir={workdir} holds checkpoints and no config.json of a run: begin a run from imported weights "
                f"with --config.init.checkpoint={workdir} and another --workdir, or put the file back"
            )
        return []
    changes = []
    for change in differences(_read(path), to_dict(config)):
        _refuse_if_fixed(change, workdir)
        changes.append(f"{change.name}: {change.before} -> {change.after}")
    return changes


def remember_text(fingerprint: str, workdir: Path) -> None:
    """Keeps the fingerprint of the text that the run trains on.

    Raises ConfigError where its checkpoints are from another: a new tokenizer would give every number another
    meaning.
    """
    path = workdir / "text.fingerprint"
    if has_checkpoint(workdir) and path.exists() and path.read_text().strip() != fingerprint:
        raise ConfigError(
            f"{workdir / 'data'} was prepared from other text than the run began with: put the former folder back, "
            "or use a new --workdir"
        )
    path.write_text(fingerprint + "\n")


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not readable JSON ({error}): repair it, or use a new --workdir"
        ) from None
    return record


def _refuse_if_fixed(change: Difference, workdir: Path) -> None:
    if change.name.startswith(_FIXED) and change.name not in _FREE:
        raise ConfigError(
            f"{change.name}={change.after} differs from the {change.before} that the run in {workdir} began with: "
            f"use --config.{change.name}={change.before}, or a new --workdir"
        )
