"""Mixture of experts with group-limited sigmoid routing and auxiliary-loss-free balancing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import ModelConfig
from dsjax.models.experts import Routing, chosen_experts
from dsjax.models.mlp import SwiGLU


class RouterBias(nnx.Variable):
    """Correction that steers selection towards idle experts: no gradient, no decay, float32 always."""


class MoEStats(NamedTuple):
    """What a layer reports for balancing."""

    load: Float[Array, "E"]  # real tokens that chose each expert
    balance_loss: Float[Array, ""]  # sum over sequences of Σ f·P, without its weight


class Router(nnx.Module):
    """``s = sigmoid(W_g x)``; the k best of ``s + b`` within the best groups; weights from ``s`` alone.

    A group is ranked by the sum of its two best biased scores. Everything in float32. Ties go to the lowest
    index.

    Source: V3 report §2.1.2; checkpoint keys ``mlp.gate.{weight,e_score_correction_bias}``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.hidden_size, config.n_routed_experts)
        initial = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weight = nnx.Param(initial.astype(config.param_dtype), axes=("embed", "experts"))
        self.e_score_correction_bias = RouterBias(jnp.zeros(shape[1], jnp.float32), axes=("experts",))

    def __call__(self, x: Float[Array, "*B D"]) -> Routing:
        config = self.config
        logits = jnp.matmul(x.astype(jnp.float32), self.weight[...].astype(jnp.float32), precision="highest")
        scores = jax.nn.sigmoid(logits)
        biased = jax.lax.stop_gradient(scores + self.e_score_correction_bias[...])
        _, experts = jax.lax.top_k(self._within_best_groups(biased), config.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.norm_topk_prob:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * config.routed_scaling_factor, scores)

    def _within_best_groups(self, biased: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Biased scores, -inf outside the ``topk_group`` best groups (not 0: biased scores can be negative)."""
        config = self.config
        if config.topk_group == config.n_group:
            return biased
        groups = biased.reshape(*biased.shape[:-1], config.n_group, -1)
        group_scores = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        _, best = jax.lax.top_k(group_scores, config.topk_group)
        kept = jnp.any(best[..., None] == jnp.arange(config.n_group), axis=-2)
        return jnp.where(kept[..., None], groups, -jnp.inf).reshape(biased.shape)


class Experts(nnx.Module):
    """The routed experts, stacked; every chosen (token, expert) pair is computed, none dropped.

    Source: checkpoint keys ``mlp.experts.N.{gate,up,down}_proj.weight``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size

        def stacked(rows: int, columns: int, axes: tuple[str, ...]):
            initial = config.initializer_range * jax.random.normal(rngs.params(), (experts, rows, columns))
            return nnx.Param(initial.astype(config.param_dtype), axes=("experts", *axes))

        self.gate_proj = stacked(hidden, width, ("embed", "expert_mlp"))
        self.up_proj = stacked(hidden, width, ("embed", "expert_mlp"))
        self.down_proj = stacked(width, hidden, ("expert_mlp", "embed"))

    def __call__(
        self, x: Float[Array, "B T D"], routing: Routing, *, layer: Int[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """``Σ_k weight_k · expert_k(x)``, accumulated and returned in float32.

        With ``layer`` the parameters are those of a whole stack [L, E, ...], for inference.
        """
        matrices = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        return chosen_experts(x, routing, matrices, self.config, layer=layer)


class StackedExperts(NamedTuple):
    """The experts of one layer where they lie in the stack of all layers."""

    experts: Experts
    layer: Int[Array, ""]


class MoE(nnx.Module):
    """``y = Σ_k g_k · expert_k(x) + shared(x)``. Source: V3 report §2.1.2; checkpoint keys ``mlp.*``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config, shared_width, rngs=rngs) if shared_width else None

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], stacked: StackedExperts | None = None
    ) -> tuple[Float[Array, "B T D"], MoEStats]:
        """Output and balancing statistics over the tokens that are ``real``, not padding.

        ``stacked`` stands in for this module's own experts.
        """
        routing = self.gate(x)
        y = stacked.experts(x, routing, layer=stacked.layer) if stacked else self.experts(x, routing)
        if self.shared_experts:
            y = y + self.shared_experts(x).astype(jnp.float32)
        return y.astype(x.dtype), balance_stats(routing, real)


def balance_stats(routing: Routing, real: Bool[Array, "B T"]) -> MoEStats:
    """Expert load and the sequence-wise balance loss ``Σ_i f_i P_i``, a sum over sequences; one of padding adds 0.

    ``f_i = E/(K·T) · tokens of the sequence that chose i``; ``P_i`` is the mean of ``s_i / Σ_j s_j``. Only P
    carries a gradient.

    Source: V3 report eq. 17-20.
    """
    num_experts, per_token = routing.scores.shape[-1], routing.experts.shape[-1]
    chosen = jnp.any(routing.experts[..., None] == jnp.arange(num_experts), axis=-2)
    counts = jnp.sum(chosen & real[..., None], axis=1, dtype=jnp.float32)
    tokens = jnp.sum(real, axis=1, dtype=jnp.float32)[:, None]
    safe_tokens = jnp.maximum(tokens, 1)
    share = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    mean_share = jnp.sum(jnp.where(real[..., None], share, 0), axis=1) / safe_tokens
    frequency = counts * num_experts / (per_token * safe_tokens)
    return MoEStats(jnp.sum(counts, axis=0), jnp.sum(frequency * mean_share))
