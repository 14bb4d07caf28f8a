"""Generation from the cache against running the whole sequence again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit
from on_devices import on_eight_devices
from small_model import random_model, small_config

from dsjax.inference.generate import generate


@pytest.mark.parametrize("index_topk", [16, 0])
def test_greedy_tokens_are_those_of_the_full_forward_pass(index_topk):
    model = random_model(small_config(index_topk=index_topk))
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 40)), jnp.int32)
    new = generate(model, prompts, jax.random.key(0), max_new_tokens=12, temperature=0)
    assert new.shape == (2, 12)
    # One pass over prompt and answer: the token after every prefix must be the best one there.
    whole = jnp.concatenate([prompts, new], axis=1)
    logits = quick_jit(lambda model, tokens: model.logits(model(tokens).hidden))(model, whole)
    np.testing.assert_array_equal(jnp.argmax(logits[:, 39:-1], axis=-1), new)


def test_the_same_key_gives_the_same_text_and_another_key_another():
    model = random_model(small_config())
    prompts = jnp.zeros((1, 8), jnp.int32)
    texts = [
        generate(model, prompts, jax.random.key(seed), max_new_tokens=20, temperature=1.0, top_p=0.9)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert not np.array_equal(texts[0], texts[2])


@pytest.mark.slow
def test_a_mesh_writes_what_one_device_writes():
    """Whether the prompt's tokens are shared out or not."""
    found = on_eight_devices("generate_on_mesh.py")
    assert len(found) == 6
    for case, tokens in found.items():
        assert tokens == found[f"one device, {case.split(', ')[-1]}"], case
