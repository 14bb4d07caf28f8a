"""Sampling against probabilities computed with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.inference.sampling import sample


def frequencies(logits, draws=40_000, **settings):
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.vmap(lambda key: sample(logits[None], key, **settings)[0])(keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


LOGITS = jnp.log(jnp.asarray([0.05, 0.4, 0.1, 0.3, 0.15]))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.05, 0.4, 0.1, 0.3, 0.15]),
        (0.5, 1.0, np.array([0.05, 0.4, 0.1, 0.3, 0.15]) ** 2 / 0.285),
        (1.0, 0.69, [0, 0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        (1.0, 0.71, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (1.0, 0.01, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(temperature, top_p, expected):
    drawn = frequencies(LOGITS, temperature=temperature, top_p=top_p)
    np.testing.assert_allclose(drawn, expected, atol=0.012)
    assert not np.any(drawn[np.asarray(expected) == 0])


def test_temperature_zero_takes_the_best_of_each_row():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), temperature=0, top_p=0.9), [1, 0])
