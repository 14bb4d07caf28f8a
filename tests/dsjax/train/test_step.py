"""One step: what moves, what must not, and what happens when numbers go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit
from small_run import batch_of, compiled_step, random_batch, small_run

from dsjax.checkpoint.store import named_leaves
from dsjax.train.losses import objective, second_next
from dsjax.train.state import initial_state
from dsjax.train.step import update_router_bias


def step_and_state(config):
    config.freeze()
    return compiled_step(config), initial_state(config)


def fast_run():
    """A learning rate at which one step shows."""
    config = small_run()
    config.optimizer.lr, config.optimizer.warmup_steps = 3e-3, 1
    return config


def biases(state):
    return {name: np.asarray(x) for name, x in named_leaves(state).items() if "e_score" in name}


def test_every_parameter_moves_and_the_state_counts():
    step, state = step_and_state(fast_run())
    after, metrics = step(state, random_batch(0))
    before, now = named_leaves(state.model), named_leaves(after.model)
    assert [name for name in now if np.array_equal(before[name], now[name])] == []
    assert int(after.step) == 1
    assert float(metrics["train/grad_norm"]) > 0
    assert float(metrics["indexer/kl"]) > 0


def test_a_few_steps_on_one_batch_lower_every_part_of_the_loss():
    step, state = step_and_state(fast_run())
    batch = random_batch(0)
    _, first = step(state, batch)
    for _ in range(40):
        state, last = step(state, batch)
    for name in ("train/loss", "train/mtp_loss", "train/total_loss"):
        assert float(last[name]) < 0.8 * float(first[name]), name


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_router_bias_moves_by_gamma_towards_idle_experts_and_by_nothing_else(gamma):
    config = small_run()
    config.train.bias_update_speed = gamma
    config.optimizer.weight_decay = 0.9  # would show
    step, state = step_and_state(config)
    start = jax.tree.map(lambda x: x, state)
    load = np.asarray(
        quick_jit(lambda m, b: objective(m, b, config.train))(start.model, random_batch(0)).load
    )
    after, _ = step(state, random_batch(0))
    expected = gamma * np.sign(load.mean(-1, keepdims=True) - load)
    moved = np.concatenate([np.atleast_2d(bias) for bias in biases(after).values()])
    np.testing.assert_array_equal(moved, expected.astype(np.float32))
    assert not any("e_score" in name for name in named_leaves(after.optimizer))


def test_bias_update_stops_at_its_step():
    config = small_run()
    config.train.bias_freeze_step = 2
    step, state = step_and_state(config)
    seen = []
    for _ in range(4):
        state, _ = step(state, random_batch(0))
        seen.append(biases(state))
    name = next(iter(seen[0]))
    assert not np.array_equal(seen[0][name], seen[1][name])
    np.testing.assert_array_equal(seen[1][name], seen[3][name])


def test_loads_reach_the_routers_they_came_from():
    config = small_run(num_hidden_layers=3).freeze()
    model = initial_state(config).model
    load = jnp.zeros((3, 16)).at[0, 3].set(1).at[1, 5].set(1).at[2, 7].set(1)
    update_router_bias(model, load, 1.0)
    stacked = np.asarray(model.moe_layers.mlp.gate.e_score_correction_bias[...])
    mtp = np.asarray(model.mtp.layer.mlp.gate.e_score_correction_bias[...])
    assert [int(row.argmin()) for row in (*stacked, mtp)] == [3, 5, 7]


def test_a_step_with_a_non_finite_loss_changes_nothing_but_the_counters():
    step, state = step_and_state(fast_run())
    state, _ = step(state, random_batch(0))
    poisoned = state._replace(model=jax.tree.map(lambda x: x, state.model))
    poisoned.model.norm.weight[...] = poisoned.model.norm.weight[...].at[0].set(jnp.inf)
    after, metrics = step(poisoned, random_batch(1))
    assert not np.isfinite(float(metrics["train/total_loss"]))
    for name, value in named_leaves((after.model, after.optimizer)).items():
        np.testing.assert_array_equal(value, named_leaves((poisoned.model, poisoned.optimizer))[name], name)
    assert (int(after.bad_steps), int(after.bad_steps_total), int(after.step)) == (1, 1, 2)
    healed = after._replace(model=state.model)
    healed, _ = step(healed, random_batch(2))
    assert (int(healed.bad_steps), int(healed.bad_steps_total)) == (0, 1)


def test_second_next_targets_count_only_inside_a_document():
    tokens = np.array([[0, 5, 1, 0, 6, 7, 1]], np.int32)
    batch = batch_of(tokens)
    # documents [0 5 1] and [0 6 7 1]: the token that begins the second is no target
    batch["loss_mask"] = jnp.asarray([[1, 1, 0, 1, 1, 1]], jnp.float32)
    targets, counts = second_next(batch)
    np.testing.assert_array_equal(targets[0, :-1], [1, 0, 6, 7, 1])
    np.testing.assert_array_equal(counts, [[1, 0, 0, 1, 1, 0]])


def test_padding_changes_no_loss_and_no_load():
    config = small_run(initializer_range=0.2).freeze()
    model = initial_state(config).model
    batch = random_batch(0, batch=2)
    padded = {name: jnp.pad(x, ((0, 1), (0, 10))) for name, x in batch.items()}
    measure = quick_jit(lambda model, b: objective(model, b, config.train))
    plain, with_padding = measure(model, batch), measure(model, padded)
    for name in ("lm", "mtp", "balance", "indexer_kl"):
        assert float(getattr(with_padding, name)) == pytest.approx(float(getattr(plain, name)), rel=1e-5), (
            name
        )
    np.testing.assert_array_equal(plain.load, with_padding.load)
