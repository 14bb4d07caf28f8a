"""Decoding against a cache gives what the forward pass over the whole sequence gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import (
    logits_of,
    quick_jit,
    random_model,
    random_tokens,
    relative,
    small_config,
    smallest_margin,
    with_config,
)

from dsjax.models.transformer import cache_from

LENGTH = 600
SEED = 13  # the selection has no near-ties: they would be decided either way
ONE_BLOCK = {"attention_block_size": LENGTH}
V3 = {"index_topk": 0}


@quick_jit
def prefill(model, tokens):
    """A cache for LENGTH tokens that begins with ``tokens``."""
    return cache_from(model(tokens).latents, LENGTH)


@quick_jit
def empty_like(cache):
    return jax.tree.map(jnp.zeros_like, cache)


@functools.partial(quick_jit, static_argnames="at_a_time")
def decode(model, tokens, first, cache, *, at_a_time: int = 1):
    """Logits of ``tokens`` [B, n], the first of which is number ``first`` [B] of its sequence."""
    batch, count = tokens.shape
    numbers = first[:, None] + jnp.arange(count)

    def step(cache, chunk):
        hidden, cache = model.decode(*chunk, cache)
        return cache, model.logits(hidden)

    def chunks(x):
        return x.reshape(batch, count // at_a_time, at_a_time).swapaxes(0, 1)

    _, logits = jax.lax.scan(step, cache, (chunks(tokens), chunks(numbers)))
    return logits.swapaxes(0, 1).reshape(batch, count, -1)


@functools.cache
def small(**changes):
    return random_model(small_config(**ONE_BLOCK | changes), SEED)


@functools.cache
def whole(**changes):
    """Tokens, and their logits in one forward pass."""
    model = small(**changes)
    tokens = random_tokens(model.config, (1, LENGTH), SEED)
    if 0 < model.config.index_topk < LENGTH:
        assert smallest_margin(model, tokens) > 4e-6, "use another seed"
    return tokens, np.asarray(logits_of(model, tokens))


@pytest.mark.parametrize("changes", [{}, V3], ids=["v32", "v3"])
def test_from_an_empty_cache(changes):
    tokens, expected = whole(**changes)
    cache = empty_like(prefill(small(**changes), tokens[:, :300]))
    assert relative(decode(small(**changes), tokens, np.array([0]), cache), expected) < 1e-5


@pytest.mark.parametrize("changes", [{}, V3], ids=["v32", "v3"])
def test_from_the_cache_of_a_prefill(changes):
    tokens, expected = whole(**changes)
    cache = prefill(small(**changes), tokens[:, :300])
    logits = decode(small(**changes), tokens[:, 300:], np.array([300]), cache)
    assert relative(logits, expected[:, 300:]) < 1e-5


def test_several_tokens_at_a_time():
    """As in speculative decoding: the new tokens of a step see each other as far as they are earlier."""
    tokens, expected = whole()
    cache = prefill(small(), tokens[:, :300])
    logits = decode(small(), tokens[:, 300:], np.array([300]), cache, at_a_time=5)
    assert relative(logits, expected[:, 300:]) < 1e-5


def test_sequences_of_a_batch_stand_at_different_places():
    """The second goes on at 200 in a cache where other tokens stand from there to 300: nothing sees them."""
    tokens, expected = whole()
    other = random_tokens(small().config, (1, 100), seed=99)
    prompts = np.concatenate([tokens[:, :300], np.concatenate([tokens[:, :200], other], axis=1)])
    rest = np.concatenate([tokens[:, 300:550], tokens[:, 200:450]])
    logits = decode(small(), rest, np.array([300, 200]), prefill(small(), prompts))
    assert relative(logits[:1], expected[:, 300:550]) < 1e-5
    assert relative(logits[1:], expected[:, 200:450]) < 1e-5


def test_a_new_token_is_written_into_the_cache_at_its_place_alone():
    tokens, _ = whole()
    before = prefill(small(), tokens[:, :300])
    _, after = quick_jit(type(small()).decode)(small(), tokens[:, 300:301], np.array([[300]]), before)
    expected = quick_jit(lambda model, tokens: model(tokens).latents)(small(), tokens[:, :301])
    for old, new, forward in zip(*map(jax.tree.leaves, (before, after, expected)), strict=True):
        np.testing.assert_array_equal(np.delete(new, 300, axis=2), np.delete(old, 300, axis=2))
        assert relative(new[:, :, 300], forward[:, :, 300]) < 1e-5


# The prefill is one block as well: see test_bfloat16.py.
BFLOAT16 = {"compute_dtype": "bfloat16", "attention_block_size": 300}


@pytest.mark.parametrize("dense_attention_max_length", [LENGTH, 64], ids=["mha", "mqa"])
def test_bfloat16_without_choices(dense_attention_max_length):
    """With every key selected and every expert chosen the model is continuous, and rounding stays small.

    Otherwise bfloat16 decides a few selections and routings in a hundred differently, and a comparison of
    logits would measure how many.
    """
    changes = BFLOAT16 | {"index_topk": LENGTH, "num_experts_per_tok": 16, "n_group": 1, "topk_group": 1}
    changes |= {"dense_attention_max_length": dense_attention_max_length}
    tokens, expected = whole(**changes)
    cache = prefill(small(**changes), tokens[:, :300])
    logits = decode(small(**changes), tokens[:, 300:], np.array([300]), cache)
    assert jax.tree.leaves(cache)[0].dtype == jnp.bfloat16
    assert relative(logits, expected[:, 300:]) < 2e-2


def test_bfloat16_with_choices():
    """Decoding is as near to float32 as the forward pass is, and most tokens are as near to each other as above.

    Some choices differ between any two ways of rounding; a token that follows one is 10 % off in both.
    """
    tokens, exact = whole()
    model = with_config(small(), **BFLOAT16)
    forward = np.asarray(logits_of(model, tokens))[:, 300:]
    decoded = np.asarray(decode(model, tokens[:, 300:], np.array([300]), prefill(model, tokens[:, :300])))
    assert relative(decoded, exact[:, 300:]) < 1.2 * relative(forward, exact[:, 300:])
    each = np.linalg.norm(decoded - forward, axis=-1) / np.linalg.norm(forward, axis=-1)
    assert np.median(each) < 3e-2
