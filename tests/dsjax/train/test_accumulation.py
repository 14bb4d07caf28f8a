"""A batch in parts, one after another, is the batch."""

import jax
import numpy as np
import pytest
from numerics import quick_jit
from small_model import variables
from small_run import random_batch, small_run

from dsjax.config import ConfigError
from dsjax.train.gradients import losses_and_gradients
from dsjax.train.state import initial_state
from dsjax.train.step import build_train_step


def padded_batch() -> dict[str, np.ndarray]:
    """Four sequences of unequal padding, one of nothing else."""
    batch = {name: np.array(value) for name, value in random_batch(3, batch=4, length=48).items()}
    real = np.arange(48) < np.array([48, 30, 0, 7])[:, None]
    batch["segment_ids"] = np.where(real, batch["segment_ids"], 0)
    batch["loss_mask"] = np.where(real, batch["loss_mask"], 0).astype(np.float32)
    batch["loss_mask"][0, :20] = 0
    return batch


def sure(path: tuple, x: jax.Array) -> jax.Array:
    """An indexer with opinions: of an untrained one the KL is a difference of nearly equal numbers."""
    return x * 5 if "indexer" in jax.tree_util.keystr(path) else x


def run_with(accumulation_steps: int):
    config = small_run()
    config.train.batch_size, config.train.sequence_length = 4, 48
    config.train.accumulation_steps = accumulation_steps
    config.train.balance_loss_weight = 0.1
    return config.freeze()


@pytest.mark.parametrize("parts", [2, 4])
def test_losses_gradients_and_bias(parts):
    whole, split = run_with(1), run_with(parts)
    state, batch = initial_state(whole), padded_batch()
    state = state._replace(model=jax.tree_util.tree_map_with_path(sure, state.model))

    def both(config):
        return quick_jit(lambda model: losses_and_gradients(model, batch, config.train, 0.3))(state.model)

    (losses, gradients), (summed, total) = both(whole), both(split)
    for name, wanted, found in zip(losses._fields, losses, summed, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(summed.load, losses.load)
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(total), strict=True))
    apart = [float(np.linalg.norm(found - wanted)) for wanted, found in pairs]
    norms = [float(np.linalg.norm(wanted)) for wanted, _ in pairs]
    assert np.linalg.norm(apart) <= 1e-6 * np.linalg.norm(norms)
    for difference, norm in zip(apart, norms, strict=True):  # of those whose terms cancel, rounding is more
        assert difference <= 3e-6 * norm

    states = [quick_jit(build_train_step(config))(state, batch)[0] for config in (whole, split)]
    biases = [
        {name: value for name, value in variables(state.model) if "correction_bias" in name}
        for state in states
    ]
    for name, wanted in biases[0].items():
        assert np.any(wanted[...]), name
        np.testing.assert_array_equal(biases[1][name][...], wanted[...])


def test_parts_are_equal():
    config = small_run()
    config.train.batch_size, config.train.accumulation_steps = 6, 4
    with pytest.raises(
        ConfigError, match=r"train.batch_size=6 is not a multiple of train.accumulation_steps=4"
    ):
        config.check()
