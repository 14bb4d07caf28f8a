"""The folders that hold a model of ours: what ``convert import`` wrote, and the workdir of a run."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_config import check_countable, read_config
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config import ModelConfig, model_from_dict

HF = "hf"  # the folder for what came with released weights


class ModelFolder(NamedTuple):
    """A model and where its newest checkpoint lies."""

    path: Path
    step: Path  # of the orbax checkpoint
    model: ModelConfig
    hf_values: dict[str, Any]  # of the config.json that came with the weights, if any did


def open_model_folder(path: Path) -> ModelFolder:
    """Finds the newest checkpoint and its configuration. Raises CheckpointError where one is missing."""
    if not os.path.isdir(path / "checkpoints"):
        raise CheckpointError(
            f"{path} holds no checkpoints: name a folder of `convert import` or a --workdir of train.py"
        )
    try:
        store = CheckpointStore(path, keep=None)
        step = store.latest_step
        store.close()
    except OSError as error:
        raise CheckpointError(f"{path / 'checkpoints'} cannot be read: {error.strerror}") from error
    if step is None:
        raise CheckpointError(f"{path / 'checkpoints'} holds no finished checkpoint")
    came = read_config(path / HF) if (path / HF / "config.json").exists() else None
    run = path / "config.json"
    if run.exists():
        model = _model_of_run(run)
    elif came:
        model = came.model
    else:
        raise CheckpointError(f"{path} has neither config.json of a run nor {HF}/config.json of an import")
    return ModelFolder(path, path / "checkpoints" / str(step), model, came.values if came else {})


def _model_of_run(path: Path) -> ModelConfig:
    try:
        model = model_from_dict(json.loads(path.read_text()))
        model.check()
        check_countable(model)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is no configuration of a run ({error})") from None
    return model
