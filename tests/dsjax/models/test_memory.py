"""Memory of a training step: linear in the number of tokens, whatever the length of the sequences."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from numerics import quick_jit
from small_model import small_config

from dsjax.models.transformer import Transformer

TOKENS = 8192


def training_loss(model, tokens):
    """Of the language model and of the indexer, whose gradient needs the index scores a second time."""
    output = model(tokens, with_indexer_loss=True)
    logits = jax.nn.log_softmax(model.logits(output.hidden)[:, :-1])
    indexer = sum(jnp.mean(stats.indexer_kl) for stats in output.stats if stats is not None)
    return indexer - jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def temporary_bytes(length: int, **changes) -> int:
    """What the compiler sets aside for the gradient of the loss of a batch of TOKENS tokens."""
    changes |= {"max_position_embeddings": 16384, "remat": "layer", "first_k_dense_replace": 0}
    config = small_config(**changes)
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((TOKENS // length, length), jnp.int32)
    compiled = quick_jit(jax.grad(training_loss)).lower(model, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_length_costs_no_memory():
    """In MQA form, which long sequences take: attention of 8,192 tokens at once would be 16 times that of 1,024."""
    short, long = (temporary_bytes(length, dense_attention_max_length=64) for length in (1024, 8192))
    assert long < 1.25 * short
