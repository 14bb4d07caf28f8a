"""AdamW with the report's learning-rate shape."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dsjax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: ArrayLike) -> Float[Array, ""]:
    """Rate of optimizer step ``step`` (from 0): warm-up, plateau, cosine to a floor, and a last lower floor.

    Source: V3 report §4.2.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = config.lr * jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.cosine_end_step:
        start, end = config.cosine_start_step, config.cosine_end_step
        progress = jnp.clip((step - start) / (end - start), 0, 1)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        falling = config.lr_floor + (config.lr - config.lr_floor) * fall
        rate = jnp.where(step >= start, jnp.minimum(rate, falling), rate)
    if config.last_start_step:
        rate = jnp.where(step >= config.last_start_step, config.lr_last, rate)
    return rate


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled decay of matrices, and the schedule."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _with_moment_dtype(adam, jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(lambda step: learning_rate(config, step)),
    )


def decayed(params: nnx.State) -> nnx.State:
    """True for matrices, False for norm weights and biases, whether or not they are stacked over layers."""

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(len([axis for axis in variable.axes if axis != "layers"]) > 1)

    return jax.tree.map(is_matrix, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _with_moment_dtype(adam: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Keeps both moments in ``dtype`` between steps; the update itself runs in float32."""

    def cast(state: optax.OptState, to: jnp.dtype) -> optax.OptState:
        assert isinstance(state, optax.ScaleByAdamState)
        mu, nu = jax.tree.map(lambda moment: moment.astype(to), (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def init(params: optax.Params) -> optax.OptState:
        return cast(adam.init(params), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = adam.update(updates, cast(state, jnp.dtype("float32")), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
