"""A run small enough to compile in seconds, with every part of the model in it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from numerics import quick_jit

from dsjax.config import ModelConfig, RunConfig, presets
from dsjax.train.step import build_train_step


@functools.cache
def compiled_step(config: RunConfig):
    """The step of a frozen run, compiled once for all tests that use it."""
    return quick_jit(build_train_step(config))


def small_model(**changes) -> ModelConfig:
    """Two layers (one dense), 16 experts, indexer, MTP."""
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 16,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "attention_block_size": 64,
    }
    return dataclasses.replace(presets.v32_tiny(), **(shape | changes))


def small_run(**model_changes) -> RunConfig:
    """Not frozen, so that a test may change it; freeze before use."""
    return RunConfig(model=small_model(**model_changes))


def random_batch(seed: int, *, batch: int = 4, length: int = 48, vocab: int = 96) -> dict[str, jax.Array]:
    """Tokens without structure, one document a sequence."""
    tokens = np.random.default_rng(seed).integers(3, vocab, (batch, length + 1), dtype=np.int32)
    return batch_of(tokens)


def batch_of(tokens: np.ndarray) -> dict[str, jax.Array]:
    """Sequences of one token more than the batch is long."""
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        "loss_mask": jnp.ones(shape, jnp.float32),
    }
