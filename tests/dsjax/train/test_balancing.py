"""The router bias evens out the load of skewed text, and nothing else does."""

import jax
import numpy as np
import pytest
from small_run import batch_of, compiled_step, small_run

from dsjax.train.state import initial_state

STEPS = 200


def skewed_batch(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Zipf's law: a few tokens make up much of the text, and each always asks for the same experts."""
    ranks = np.arange(1, 94)
    share = ranks**-0.8 / np.sum(ranks**-0.8)
    return batch_of(3 + rng.choice(93, size=(8, 65), p=share).astype(np.int32))


def imbalance_while_training(gamma: float) -> np.ndarray:
    """Maximum over mean load, averaged over ten steps at a time."""
    config = small_run(
        num_nextn_predict_layers=0,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        hidden_size=64,
        initializer_range=0.02,
    )
    config.train.bias_update_speed = gamma
    config.train.balance_loss_weight = 0.0
    config.optimizer.lr, config.optimizer.warmup_steps = 1e-5, 1
    config.freeze()
    step, state, rng = compiled_step(config), initial_state(config), np.random.default_rng(0)
    loads = []
    for _ in range(STEPS):
        state, metrics = step(state, skewed_batch(rng))
        loads.append(float(metrics["moe/load_max_over_mean"]))
    return np.reshape(loads, (-1, 10)).mean(1)


@pytest.mark.slow
def test_bias_balances_skewed_text():
    with_bias, without = imbalance_while_training(0.001), imbalance_while_training(0.0)
    assert with_bias[-1] < 1.5
    assert np.all(without > 2)
