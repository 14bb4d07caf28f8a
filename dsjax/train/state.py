"""Everything that a training run carries from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dsjax.config import RunConfig
from dsjax.models.transformer import Transformer
from dsjax.parallel.placement import placed, shardings
from dsjax.train.optimizer import build_optimizer


class TrainState(NamedTuple):
    """A pytree: what a checkpoint holds beside the data iterator."""

    step: Int[Array, ""]  # optimizer steps taken or skipped
    model: Transformer
    optimizer: optax.OptState
    bad_steps: Int[Array, ""]  # skipped in a row for a non-finite loss or gradient
    bad_steps_total: Int[Array, ""]


def initial_state(
    config: RunConfig, model: Transformer | None = None, *, mesh: Mesh | None = None
) -> TrainState:
    """A fresh state, of ``model`` or of random weights; the same seed gives the same ones on every mesh."""

    def build(model: Transformer | None) -> TrainState:
        if model is None:
            # "rbg" keys: half the time to compile, and sharded initialisation without communication.
            key = jax.random.key(config.seed, impl="rbg")
            model = Transformer(config.model, rngs=nnx.Rngs(key))
        params = nnx.state(model, nnx.Param)
        zero = jnp.int32(0)
        return TrainState(zero, model, build_optimizer(config.optimizer).init(params), zero, zero)

    if mesh is None:
        return jax.jit(build, donate_argnums=0)(model)
    lies = shardings(placed(jax.eval_shape(build, model), mesh))
    with jax.set_mesh(mesh):
        return jax.jit(build, donate_argnums=0, out_shardings=lies)(model)


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Shapes, dtypes and places of ``initial_state``, nothing allocated: the target of a restore."""
    return placed(jax.eval_shape(lambda: initial_state(config)), mesh)
