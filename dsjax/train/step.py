"""One optimizer step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dsjax.config import RunConfig, TrainConfig
from dsjax.models.batch import DeviceBatch
from dsjax.models.transformer import Transformer
from dsjax.parallel.placement import batch_sharding, shardings
from dsjax.train.gradients import losses_and_gradients
from dsjax.train.losses import Objective, total
from dsjax.train.optimizer import build_optimizer, learning_rate
from dsjax.train.state import TrainState, abstract_state

Metrics = dict[str, Float[Array, ""]]


def build_train_step(config: RunConfig) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """The function ``(state, batch) -> (state, metrics)`` for ``jax.jit`` with the state donated."""
    optimizer = build_optimizer(config.optimizer)
    train = config.train

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        graph, params, rest = nnx.split(state.model, nnx.Param, ...)
        mtp_weight = _mtp_weight(train, state.step)

        parts, gradients = losses_and_gradients(state.model, batch, train, mtp_weight)
        loss = total(parts, train, mtp_weight)
        grad_norm = optax.global_norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def updated(params: nnx.State, optimizer_state: optax.OptState):
            updates, optimizer_state = optimizer.update(
                gradients, optimizer_state, params, grad_norm=grad_norm
            )
            return optax.apply_updates(params, updates), optimizer_state

        params, optimizer_state = jax.lax.cond(
            good, updated, lambda *unchanged: unchanged, params, state.optimizer
        )
        model = nnx.merge(graph, params, rest)
        update_router_bias(model, parts.load, jnp.where(good, _bias_speed(train, state.step), 0.0))
        bad = (~good).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            model=model,
            optimizer=optimizer_state,
            bad_steps=(state.bad_steps + 1) * bad,
            bad_steps_total=state.bad_steps_total + bad,
        )
        rate = learning_rate(config.optimizer, state.step)
        return new_state, _metrics(loss, parts, grad_norm, rate, new_state)

    return train_step


def lowered_step(config: RunConfig, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """The step as it is to be compiled: the state donated, and everything where it lies on the mesh."""
    shape = (config.train.batch_size, config.train.sequence_length)
    lies = batch_sharding(mesh, shape[0])
    integer: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lies)
    real: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=lies)
    batch = DeviceBatch(
        tokens=integer, targets=integer, segment_ids=integer, positions=integer, loss_mask=real
    )
    state, step = abstract_state(config, mesh), build_train_step(config)
    if mesh is None:
        return jax.jit(step, donate_argnums=0).lower(state, batch)
    out = shardings(state), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch)


def update_router_bias(
    model: Transformer, load: Float[Array, "L E"], speed: Float[Array, ""] | float
) -> None:
    """``b_i += γ · sign(mean load - load_i)`` for every router, in place. Load is that of the global batch.

    Source: V3 report §2.1.2.
    """
    change = speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    first = 0
    for router in model.routers:
        bias = router.e_score_correction_bias
        count = 1 if bias.ndim == 1 else bias.shape[0]
        bias[...] += change[first : first + count].reshape(bias.shape)
        first += count


def _mtp_weight(train: TrainConfig, step: Array) -> Float[Array, ""] | float:
    if not train.mtp_switch_step:
        return train.mtp_loss_weight
    return jnp.where(step < train.mtp_switch_step, train.mtp_loss_weight, train.mtp_loss_weight_late)


def _bias_speed(train: TrainConfig, step: Array) -> Float[Array, ""] | float:
    if not train.bias_freeze_step:
        return train.bias_update_speed
    return jnp.where(step < train.bias_freeze_step, train.bias_update_speed, 0.0)


def _metrics(loss, parts: Objective, grad_norm, rate, state: TrainState) -> Metrics:
    mean_load = jnp.mean(parts.load, axis=-1, keepdims=True)
    share = parts.load / jnp.maximum(jnp.sum(parts.load, axis=-1, keepdims=True), 1)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-20)), axis=-1) / jnp.log(share.shape[-1])
    imbalance = jnp.max(parts.load, axis=-1) / jnp.maximum(mean_load[:, 0], 1)
    return {
        "train/loss": parts.lm,
        "train/total_loss": loss,
        "train/mtp_loss": parts.mtp,
        "train/balance_loss": parts.balance,
        "train/grad_norm": grad_norm,
        "train/lr": rate,
        "train/skipped_steps": state.bad_steps_total,
        "train/skipped_in_a_row": state.bad_steps,
        "indexer/kl": parts.indexer_kl,
        "moe/load_max_over_mean": jnp.mean(imbalance),
        "moe/load_max_over_mean_worst_layer": jnp.max(imbalance),
        "moe/load_entropy": jnp.mean(entropy),
    }
