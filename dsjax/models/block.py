"""One transformer layer."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.models.mla import Latents, MultiHeadLatentAttention
from dsjax.models.mlp import SwiGLU
from dsjax.models.moe import MoE, MoEStats, StackedExperts
from dsjax.models.norms import RMSNorm
from dsjax.models.rope import Rope


class LayerStats(NamedTuple):
    """What a layer reports beside its output. ``moe`` is None for a dense layer."""

    indexer_kl: Float[Array, "B T"]
    moe: MoEStats | None


class DecoderLayer(nnx.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``; the ffn is dense or a mixture of experts.

    Source: V3 report §2.1; checkpoint keys ``model.layers.N.*``.
    """

    def __init__(self, config: ModelConfig, *, sparse_ffn: bool, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = (
            MoE(config, rngs=rngs) if sparse_ffn else SwiGLU(config, config.intermediate_size, rngs=rngs)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        segment_ids: Int[Array, "B T"],
        stacked: StackedExperts | None = None,
        *,
        with_indexer_loss: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerStats, Latents]:
        """Whole sequences: output, statistics, and what the cache would keep."""
        u, kl, latents = self.self_attn(
            self.input_layernorm(x), rope, segment_ids, with_indexer_loss=with_indexer_loss
        )
        x, moe = self._feed_forward(x + u, segment_ids != 0, stacked)
        return x, LayerStats(kl, moe), latents

    def decode(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        number: Int[Array, "B T"],
        cache: Latents,
        stacked: StackedExperts | None = None,
    ) -> tuple[Float[Array, "B T D"], Latents]:
        """New tokens against a cache: output and the cache with them in it."""
        u, cache = self.self_attn.decode(self.input_layernorm(x), rope, number, cache)
        x, _ = self._feed_forward(x + u, jnp.ones(number.shape, bool), stacked)
        return x, cache

    def _feed_forward(self, x, real, stacked: StackedExperts | None):
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(normed, real, stacked)
            return x + y, stats
        return x + self.mlp(normed), None
