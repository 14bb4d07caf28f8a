"""The folder of a run, and whose it is."""

import json
import os
from pathlib import Path

from dsjax.checkpoint.store import has_checkpoint
from dsjax.config import ConfigError, RunConfig
from dsjax.config.record import to_dict

# What decides the parameters' shapes and which batch comes next: a run cannot go on with another value.
_FIXED = ("model.", "data.", "seed", "train.batch_size", "train.sequence_length", "optimizer.moment_dtype")
# Part of the model's configuration that changes how it is computed, not what.
_FREE = (
    "model.compute_dtype",
    "model.remat",
    "model.attention_block_size",
    "model.dense_attention_max_length",
)


def claim(config: RunConfig, workdir: Path) -> list[str]:
    """Makes the folder and keeps ``config.json`` in it; returns what changed since the run began there.

    A run begins with its first checkpoint: until then any field may be corrected.

    Raises ConfigError where the folder holds a run of another model or other data, naming the field.
    """
    workdir.mkdir(parents=True, exist_ok=True)
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
        return []
    before, after, changes = _flat(_read(path)), _flat(to_dict(config)), []
    for name in after:
        if before.get(name) != after[name]:
            _refuse_if_fixed(name, before.get(name), after[name], workdir)
            changes.append(f"{name}: {before.get(name)} -> {after[name]}")
    return changes


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not readable JSON ({error}): repair it, or use a new --workdir"
        ) from None


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _refuse_if_fixed(name: str, before: object, now: object, workdir: Path) -> None:
    if name.startswith(_FIXED) and name not in _FREE:
        raise ConfigError(
            f"{name}={now} differs from the {before} that the run in {workdir} began with: "
            f"use --config.{name}={before}, or a new --workdir"
        )
