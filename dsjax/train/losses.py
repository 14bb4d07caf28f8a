"""The training objective and its parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import TrainConfig
from dsjax.models.batch import DeviceBatch
from dsjax.models.block import LayerStats
from dsjax.models.cross_entropy import cross_entropy_sum
from dsjax.models.moe import MoEStats
from dsjax.models.transformer import Transformer


class Objective(NamedTuple):
    """The parts of the loss, each a mean over what it counts, before its weight."""

    lm: Float[Array, ""]  # nats a token
    mtp: Float[Array, ""]  # nats a token, for the token after the next
    balance: Float[Array, ""]
    indexer_kl: Float[Array, ""]  # nats a token and layer
    load: Float[Array, "L E"]  # tokens that chose each expert, a row a router, MTP's last


def objective(model: Transformer, batch: DeviceBatch, config: TrainConfig) -> Objective:
    """Runs the model once and measures every part of the loss."""
    with_kl = model.config.has_indexer and config.indexer_loss_weight > 0
    output = model(batch["tokens"], batch["positions"], batch["segment_ids"], with_indexer_loss=with_kl)
    head = model.lm_head.weight[...]
    lm = _mean_nll(model.norm(output.hidden), head, batch["targets"], batch["loss_mask"])
    layers = [stats for stats in output.stats if stats is not None]
    mtp = jnp.float32(0)
    if model.mtp is not None:
        hidden, mtp_stats = model.predict_second_next(
            output.hidden,
            batch["targets"],
            batch["positions"],
            batch["segment_ids"],
            with_indexer_loss=with_kl,
        )
        mtp = _mean_nll(hidden, head, *second_next(batch))
        layers.append(_as_stack(mtp_stats))
    routers: list[MoEStats] = [stats.moe for stats in layers if stats.moe is not None]
    return Objective(
        lm=lm,
        mtp=mtp,
        balance=jnp.mean(jnp.concatenate([moe.balance_loss for moe in routers])),
        indexer_kl=_mean_kl(layers, batch["segment_ids"]),
        load=jnp.concatenate([moe.load for moe in routers]),
    )


def total(parts: Objective, config: TrainConfig, mtp_weight: Float[Array, ""] | float) -> Float[Array, ""]:
    """``lm + λ·mtp + α·balance + weight·kl``. Source: V3 report §2.2 and §4.2, V3.2-Exp report §2.1."""
    return (
        parts.lm
        + mtp_weight * parts.mtp
        + config.balance_loss_weight * parts.balance
        + config.indexer_loss_weight * parts.indexer_kl
    )


def second_next(batch: DeviceBatch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Targets of the MTP module, ``t_{i+2}``, and which of them count.

    The last token has none; and where documents are isolated, neither has one whose next token or the one after
    belongs to another document.
    """
    targets = jnp.roll(batch["targets"], -1, axis=1)
    counts = batch["loss_mask"] * jnp.roll(batch["loss_mask"], -1, axis=1)
    return targets, counts.at[:, -1].set(0)


def _mean_nll(hidden, head, targets, mask) -> Float[Array, ""]:
    return cross_entropy_sum(hidden, head, targets, mask) / jnp.maximum(jnp.sum(mask), 1)


def _as_stack(stats: LayerStats) -> LayerStats:
    """A single layer's statistics with the leading axis of a stack of one."""
    return jax.tree.map(lambda x: x[None], stats)


def _mean_kl(layers: list[LayerStats], segment_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Over real tokens, then over layers."""
    real = segment_ids != 0
    kl = jnp.concatenate([stats.indexer_kl for stats in layers])
    per_layer = jnp.sum(jnp.where(real, kl, 0), axis=(1, 2)) / jnp.maximum(jnp.sum(real), 1)
    return jnp.mean(per_layer)
