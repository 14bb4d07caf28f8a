"""Losses and gradients of a batch, whole or in parts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.config import TrainConfig
from dsjax.models.batch import DeviceBatch
from dsjax.models.transformer import Transformer
from dsjax.parallel.placement import in_parts
from dsjax.train.losses import Counts, Objective, objective, total


def losses_and_gradients(
    model: Transformer, batch: DeviceBatch, config: TrainConfig, mtp_weight: Float[Array, ""] | float
) -> tuple[Objective, nnx.State]:
    """Every part of the loss, and the gradients of their ``total``.

    With ``config.accumulation_steps`` the batch is run in so many parts, one after another. Means are over what the
    whole batch counts, so that the sum over the parts, in float32, is that of the batch however padding is spread.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    counts = Counts.of(batch)

    def loss_of(params: nnx.State, part: DeviceBatch) -> tuple[Float[Array, ""], Objective]:
        losses = objective(nnx.merge(graph, params, rest), part, config, counts)
        return total(losses, config, mtp_weight), losses

    def of_part(part: DeviceBatch) -> tuple[Objective, nnx.State]:
        gradients, losses = jax.grad(loss_of, has_aux=True)(params, part)
        return losses, gradients

    if config.accumulation_steps == 1:
        return of_part(batch)

    def add(sums: tuple[Objective, nnx.State], part: DeviceBatch):
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, of_part(part)), None

    parts = in_parts(batch, config.accumulation_steps)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, parts)[0]
