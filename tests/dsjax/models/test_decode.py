"""Decoding against a cache gives what the forward pass over the whole sequence gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import random_model, random_tokens, small_config, smallest_margin, with_config

from dsjax.models.transformer import cache_from

LENGTH = 600
SEED = 13  # the selection has no near-ties: they would be decided either way
ONE_BLOCK = {"attention_block_size": LENGTH}
V3 = {"index_topk": 0}


@quick_jit
def forward(model, tokens):
    """Logits, and a cache for LENGTH tokens that begins with ``tokens``."""
    output = model(tokens)
    return model.logits(output.hidden), cache_from(output.latents, LENGTH)


@functools.partial(quick_jit, static_argnames="at_a_time")
def decode(model, tokens, first, cache, *, at_a_time: int = 1):
    """Logits of ``tokens`` [B, n], the first of which is number ``first`` [B] of its sequence, and the cache."""
    batch, count = tokens.shape
    numbers = first[:, None] + jnp.arange(count)

    def step(cache, chunk):
        hidden, cache = model.decode(*chunk, cache)
        return cache, model.logits(hidden)

    def chunks(x):
        return x.reshape(batch, count // at_a_time, at_a_time).swapaxes(0, 1)

    cache, logits = jax.lax.scan(step, cache, (chunks(tokens), chunks(numbers)))
    return logits.swapaxes(0, 1).reshape(batch, count, -1), cache


@functools.cache
def small(**changes):
    return random_model(small_config(**ONE_BLOCK | changes), SEED)


@functools.cache
def whole(**changes):
    """Tokens, and their logits and cache in one forward pass."""
    model = small(**changes)
    tokens = random_tokens(model.config, (1, LENGTH), SEED)
    if 0 < model.config.index_topk < LENGTH:
        assert smallest_margin(model, tokens) > 4e-6, "use another seed"
    return tokens, *forward(model, tokens)


@pytest.mark.parametrize("changes", [{}, V3], ids=["v32", "v3"])
def test_from_an_empty_cache(changes):
    tokens, expected, expected_cache = whole(**changes)
    empty = jax.tree.map(jnp.zeros_like, expected_cache)
    logits, cache = decode(small(**changes), tokens, np.array([0]), empty)
    assert relative(logits, expected) < 1e-5
    for ours, theirs in zip(*map(jax.tree.leaves, (cache, expected_cache)), strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("changes", [{}, V3], ids=["v32", "v3"])
def test_from_the_cache_of_a_prefill(changes):
    tokens, expected, _ = whole(**changes)
    _, prefilled = forward(small(**changes), tokens[:, :300])
    logits, cache = decode(small(**changes), tokens[:, 300:], np.array([300]), prefilled)
    assert relative(logits, expected[:, 300:]) < 1e-5
    for after, before in zip(*map(jax.tree.leaves, (cache, prefilled)), strict=True):
        np.testing.assert_array_equal(after[:, :, :300], before[:, :, :300])


def test_several_tokens_at_a_time():
    """As in speculative decoding: the new tokens of a step see each other as far as they are earlier."""
    tokens, expected, cache = whole()
    logits, _ = decode(small(), tokens[:, 300:], np.array([300]), cache, at_a_time=5)
    assert relative(logits, expected[:, 300:]) < 1e-5


def test_sequences_of_a_batch_stand_at_different_places():
    """In caches where other tokens stand behind theirs: nothing sees those before they are written over."""
    tokens, expected, cache = whole()
    both = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), cache)
    spoilt = jax.tree.map(lambda x: x.at[:, 0, 300:].multiply(-3).at[:, 1, 200:].multiply(-3), both)
    rest = np.concatenate([tokens[:, 300:550], tokens[:, 200:450]])
    logits, _ = decode(small(), rest, np.array([300, 200]), spoilt)
    assert relative(logits[:1], expected[:, 300:550]) < 1e-5
    assert relative(logits[1:], expected[:, 200:450]) < 1e-5


BFLOAT16 = {"compute_dtype": "bfloat16"}


@pytest.mark.parametrize("dense_attention_max_length", [LENGTH, 64], ids=["mha", "mqa"])
def test_bfloat16_without_choices(dense_attention_max_length):
    """With every key selected and every expert chosen the model is continuous, and rounding stays small.

    Otherwise bfloat16 decides a few selections and routings in a hundred differently, and a comparison of
    logits would measure how many.
    """
    changes = BFLOAT16 | {"index_topk": LENGTH, "num_experts_per_tok": 16, "n_group": 1, "topk_group": 1}
    changes |= {"dense_attention_max_length": dense_attention_max_length}
    tokens, expected, cache = whole(**changes)
    logits, _ = decode(small(**changes), tokens[:, 300:], np.array([300]), cache)
    assert jax.tree.leaves(cache)[0].dtype == jnp.bfloat16
    assert relative(logits, expected[:, 300:]) < 2e-2


def test_bfloat16_with_choices():
    """Decoding is as near to float32 as the forward pass is, and most tokens are as near to each other as above.

    Some choices differ between any two ways of rounding; a token that follows one is 10 % off in both.
    """
    tokens, exact, _ = whole()
    rounded = with_config(small(), **BFLOAT16)
    whole_pass, cache = forward(rounded, tokens)
    decoded, _ = decode(rounded, tokens[:, 300:], np.array([300]), cache)
    exact, whole_pass, decoded = (np.asarray(x) for x in (exact[:, 300:], whole_pass[:, 300:], decoded))
    assert relative(decoded, exact) < 1.2 * relative(whole_pass, exact)
    each = np.linalg.norm(decoded - whole_pass, axis=-1) / np.linalg.norm(whole_pass, axis=-1)
    assert np.median(each) < 3e-2
