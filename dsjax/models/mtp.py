"""Multi-token prediction: one more layer that predicts the token after the next."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.models.block import DecoderLayer, LayerStats
from dsjax.models.linear import Linear
from dsjax.models.norms import RMSNorm
from dsjax.models.rope import Rope


class MultiTokenPrediction(nnx.Module):
    """``h' = layer(W_eh [enorm(embedding of t_{i+1}) ; hnorm(h_i)])``, normed for the main model's head.

    The embedding comes first in the concatenation, as in the checkpoint (the report prints the other order).
    Embedding and head are the main model's.

    Source: V3 report §2.2; checkpoint keys ``model.layers.{num_hidden_layers}.*``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(width, eps=eps)
        self.hnorm = RMSNorm(width, eps=eps)
        self.eh_proj = Linear(
            (2 * width, width),
            ("embed_pair", "embed"),
            std=config.initializer_range,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.layer = DecoderLayer(config, sparse_ffn=True, rngs=rngs)
        self.norm = RMSNorm(width, eps=eps)  # checkpoint key shared_head.norm.weight

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        next_embedding: Float[Array, "B T D"],
        rope: Rope,
        segment_ids: Int[Array, "B T"],
        *,
        with_indexer_loss: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerStats]:
        """Normed hidden states from which the head predicts ``t_{i+2}``, and the layer's statistics."""
        pair = jnp.concatenate([self.enorm(next_embedding), self.hnorm(hidden)], axis=-1)
        x, stats, _ = self.layer(self.eh_proj(pair), rope, segment_ids, with_indexer_loss=with_indexer_loss)
        return self.norm(x), stats
