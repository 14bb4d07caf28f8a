"""An untrained lightning indexer for a checkpoint that has none: the start of DSA training from V3.1."""

import functools
import zlib
from typing import Any

import numpy as np
from flax import nnx

from dsjax.checkpoint.fp8_arrays import quantised
from dsjax.checkpoint.hf_config import HfConfig
from dsjax.checkpoint.hf_names import CheckpointTensor
from dsjax.checkpoint.weight_dtype import FP8
from dsjax.config import ModelConfig
from dsjax.models.indexer import LightningIndexer


def fresh_indexer_tensor(
    config: HfConfig, tensor: CheckpointTensor, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """A tensor of a layer's indexer as a checkpoint would store it, and its scales if that is FP8; always the same."""
    stack, name = tensor.path.split(".self_attn.indexer.")
    indexer = _initial_indexer(config.model, zlib.crc32(f"{stack}{tensor.place}".encode()))
    variable: Any = functools.reduce(getattr, name.split("."), indexer)
    values = np.asarray(variable[...]).transpose(tensor.order).reshape(tensor.shape)
    if dtype != FP8:
        return values.astype(dtype), np.empty((0, 0))
    what = f"new indexer: tensor {tensor.name}"
    return quantised(values, power_of_two=config.has_power_of_two_scales, what=what)


@functools.lru_cache(maxsize=2)
def _initial_indexer(config: ModelConfig, seed: int) -> LightningIndexer:
    return LightningIndexer(config, rngs=nnx.Rngs(seed))
