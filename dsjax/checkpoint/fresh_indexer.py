"""An untrained lightning indexer for a checkpoint that has none: the start of DSA training from V3.1."""

import functools
import zlib
from typing import Any

import numpy as np
from flax import nnx

from dsjax.checkpoint.hf_names import CheckpointTensor
from dsjax.config import ModelConfig
from dsjax.models.indexer import LightningIndexer


def fresh_indexer_tensor(config: ModelConfig, tensor: CheckpointTensor) -> np.ndarray:
    """The initial values of a tensor of a layer's indexer, as it would lie in a checkpoint; always the same ones."""
    stack, name = tensor.path.split(".self_attn.indexer.")
    indexer = _initial_indexer(config, zlib.crc32(f"{stack}{tensor.place}".encode()))
    variable: Any = functools.reduce(getattr, name.split("."), indexer)
    values = np.asarray(variable[...])
    return values.transpose(tensor.order).reshape(tensor.shape)


@functools.lru_cache(maxsize=2)
def _initial_indexer(config: ModelConfig, seed: int) -> LightningIndexer:
    return LightningIndexer(config, rngs=nnx.Rngs(seed))
