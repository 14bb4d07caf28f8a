"""What says how the layers are run changes no number beyond rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import next_token_loss, random_model, random_tokens, small_config, variables, with_config

# Choices of the selection and the routers tip at differences of rounding: both see everything here.
MODEL = random_model(small_config(index_topk=0, topk_group=4, num_experts_per_tok=16))
TOKENS = random_tokens(MODEL.config, (2, 100))


def gradients(model):
    found = variables(quick_jit(jax.grad(next_token_loss))(model, TOKENS))
    return {name: np.asarray(variable[...]) for name, variable in found}


@pytest.fixture(scope="module")
def expected():
    return gradients(MODEL)


@pytest.mark.parametrize(
    "changes",
    [{"scan_layers": False}, {"remat": "layer"}, {"remat": "attention"}, {"remat": "full"}],
    ids=str,
)
def test_gradients_stay_the_same(expected, changes):
    found = gradients(with_config(MODEL, **changes))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if np.issubdtype(gradient.dtype, np.floating) and jnp.any(expected[name]):
            assert relative(gradient, expected[name]) < 1e-5, name
