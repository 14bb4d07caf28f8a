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
from dsjax.parallel.order import shared_out


class Objective(NamedTuple):
    """The parts of the loss, each a mean over what it counts, before its weight.

    Of a part of a batch they are its share: those of all parts add up to those of the batch, as does the load.
    """

    lm: Float[Array, ""]  # nats a token
    mtp: Float[Array, ""]  # nats a token, for the token after the next
    balance: Float[Array, ""]
    indexer_kl: Float[Array, ""]  # nats a token and layer
    load: Float[Array, "L E"]  # tokens that chose each expert, a row a router, MTP's last


class Counts(NamedTuple):
    """What the means of a batch are over, at least 1 each."""

    lm: Float[Array, ""]  # targets
    mtp: Float[Array, ""]  # targets after the next token
    tokens: Float[Array, ""]  # that are no padding
    sequences: Float[Array, ""]  # with such tokens

    @classmethod
    def of(cls, batch: DeviceBatch) -> "Counts":
        """Of a whole batch."""
        real = batch["segment_ids"] != 0
        counted = batch["loss_mask"], second_next(batch)[1], real, jnp.any(real, axis=1)
        return cls(*(jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1) for counts in counted))


def objective(
    model: Transformer, batch: DeviceBatch, config: TrainConfig, counts: Counts | None = None
) -> Objective:
    """Runs the model once and measures every part of the loss; of a part of the batch that ``counts`` is of."""
    counts = counts or Counts.of(batch)
    with_kl = model.config.has_indexer and config.indexer_loss_weight > 0
    beyond = shared_out(second_next(batch))
    batch = shared_out(batch)
    output = model(batch["tokens"], batch["positions"], batch["segment_ids"], with_indexer_loss=with_kl)
    head = model.lm_head.weight[...]
    lm = cross_entropy_sum(model.norm(output.hidden), head, batch["targets"], batch["loss_mask"])
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
        mtp = cross_entropy_sum(hidden, head, *beyond)
        layers.append(_as_stack(mtp_stats))
    routers: list[MoEStats] = [stats.moe for stats in layers if stats.moe is not None]
    return Objective(
        lm=lm / counts.lm,
        mtp=mtp / counts.mtp,
        balance=jnp.mean(jnp.concatenate([moe.balance_loss for moe in routers])) / counts.sequences,
        indexer_kl=_sum_kl(layers, batch["segment_ids"]) / counts.tokens,
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


def _as_stack(stats: LayerStats) -> LayerStats:
    """A single layer's statistics with the leading axis of a stack of one."""
    return jax.tree.map(lambda x: x[None], stats)


def _sum_kl(layers: list[LayerStats], segment_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Over real tokens, a mean over layers."""
    kl = jnp.concatenate([stats.indexer_kl for stats in layers])
    return jnp.mean(jnp.sum(jnp.where(segment_ids != 0, kl, 0), axis=(1, 2)))
