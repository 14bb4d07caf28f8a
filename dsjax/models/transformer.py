"""DeepSeek-V3.2 as a whole."""

import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.models.block import DecoderLayer, LayerStats
from dsjax.models.embedding import TABLE_AXES, lookup
from dsjax.models.linear import Linear
from dsjax.models.logits import logits_of
from dsjax.models.mla import Latents
from dsjax.models.moe import MoE, Router, StackedExperts
from dsjax.models.mtp import MultiTokenPrediction
from dsjax.models.norms import RMSNorm
from dsjax.models.rope import Rope, rope_at
from dsjax.models.stack import number_of, rematerialise, stack_layers
from dsjax.parallel.order import places
from dsjax.parallel.rules import constrain

T = TypeVar("T")


class Stacks(NamedTuple, Generic[T]):
    """One value for each stack of layers, leaves [L, ...]; None where the model has no such layers."""

    dense: T | None
    moe: T | None


class Output(NamedTuple):
    """A forward pass over whole sequences."""

    hidden: Float[Array, "B T D"]  # after the last layer, before the final norm
    stats: Stacks[LayerStats]
    latents: Stacks[Latents]  # the cache of every layer


class Transformer(nnx.Module):
    """Embedding, dense layers, mixture-of-experts layers, final norm, head, and the MTP module beside them.

    Source: V3 report §2, V3.2-Exp report §1; checkpoint keys ``model.*``, ``lm_head.weight``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        embedding = config.initializer_range * jax.random.normal(
            rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32
        )
        self.embed_tokens = nnx.Param(embedding.astype(config.param_dtype), axes=TABLE_AXES)

        def layers(count: int, *, sparse_ffn: bool):
            def build(*, rngs: nnx.Rngs) -> DecoderLayer:
                return DecoderLayer(config, sparse_ffn=sparse_ffn, rngs=rngs)

            return stack_layers(build, count, rngs=rngs)

        self.dense_layers = layers(config.first_k_dense_replace, sparse_ffn=False)
        self.moe_layers = layers(config.num_moe_layers, sparse_ffn=True)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Linear(
            (config.hidden_size, config.vocab_size),
            ("embed", "vocab"),
            std=config.initializer_range,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.mtp = MultiTokenPrediction(config, rngs=rngs) if config.num_nextn_predict_layers else None

    @property
    def routers(self) -> list[Router]:
        """The routers in the order in which losses and loads list them: the stack of the layers, then MTP's."""
        layers = [self.moe_layers, self.mtp.layer if self.mtp else None]
        return [layer.mlp.gate for layer in layers if layer is not None and isinstance(layer.mlp, MoE)]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings in the compute dtype."""
        return lookup(self.embed_tokens[...].astype(self.config.compute_dtype), tokens)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        with_indexer_loss: bool = False,
        inference: bool = False,
    ) -> Output:
        """Runs whole sequences. Positions default to 0..T-1, segments to one a sequence; segment 0 is padding.

        On a mesh that shares out the tokens of a sequence, all arguments and results have them in the order of the
        devices, ``parallel.order``.

        ``inference`` promises that no gradient is taken: experts are read where they lie in the stack.
        """
        positions, segment_ids = _defaults(tokens, positions, segment_ids)
        rope = rope_at(positions, self.config)

        def run(x: Array, index_and_layer: tuple[Array, DecoderLayer], layers: DecoderLayer):
            index, layer = index_and_layer
            x = constrain(x, "batch", "length", None)
            stacked = _stacked_experts(layers, index) if inference else None
            x, stats, latents = layer(x, rope, segment_ids, stacked, with_indexer_loss=with_indexer_loss)
            return x, (stats, latents)

        x, stats, latents = self.embed(tokens), [], []
        for layers in (self.dense_layers, self.moe_layers):
            results = (None, None)
            if layers is not None:
                step = rematerialise(functools.partial(run, layers=layers), self.config.remat)
                steps = (jnp.arange(number_of(layers)), layers)
                x, results = jax.lax.scan(step, x, steps, unroll=not self.config.scan_layers)
            stats.append(results[0])
            latents.append(results[1])
        return Output(x, Stacks(*stats), Stacks(*latents))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of hidden states that have not been through the final norm."""
        return logits_of(self.norm(hidden), self.lm_head.weight[...])

    def predict_second_next(
        self,
        hidden: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        with_indexer_loss: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerStats]:
        """The MTP module: normed states from which ``lm_head`` predicts the token after ``next_tokens``.

        ``hidden`` is the main model's output; ``mtp_input`` says whether its final norm comes first.
        """
        if self.mtp is None:
            raise ValueError("this model has no multi-token-prediction module: num_nextn_predict_layers is 0")
        positions, segment_ids = _defaults(next_tokens, positions, segment_ids)
        if self.config.mtp_input == "after_final_norm":
            hidden = self.norm(hidden)
        rope, embedding = rope_at(positions, self.config), self.embed(next_tokens)
        return self.mtp(hidden, embedding, rope, segment_ids, with_indexer_loss=with_indexer_loss)

    def decode(
        self, tokens: Int[Array, "B T"], number: Int[Array, "B T"], cache: Stacks[Latents]
    ) -> tuple[Float[Array, "B T D"], Stacks[Latents]]:
        """Hidden states of new tokens against a cache, and the cache with them in it.

        ``number`` counts the tokens of each sequence from 0; it is their position and their place in the cache.
        """
        rope: Rope = rope_at(number, self.config)

        # The cache is carried, not scanned over, so that it is updated where it lies.
        def run(carry: tuple[Array, Latents], step: tuple[Array, DecoderLayer], layers: DecoderLayer):
            (x, latents), (index, layer) = carry, step
            own = jax.tree.map(lambda stacked: stacked[index], latents)
            x, own = layer.decode(x, rope, number, own, _stacked_experts(layers, index))
            return (x, jax.tree.map(lambda stacked, new: stacked.at[index].set(new), latents, own)), None

        x, caches = self.embed(tokens), []
        for layers, latents in zip((self.dense_layers, self.moe_layers), cache, strict=True):
            if layers is not None and latents is not None:
                steps = (jnp.arange(number_of(layers)), layers)
                (x, latents), _ = jax.lax.scan(functools.partial(run, layers=layers), (x, latents), steps)
            caches.append(latents)
        return x, Stacks(*caches)


def _stacked_experts(layers: DecoderLayer, index: Array) -> StackedExperts | None:
    return StackedExperts(layers.mlp.experts, index) if isinstance(layers.mlp, MoE) else None


def _defaults(tokens, positions, segment_ids):
    if positions is None:
        positions = jnp.broadcast_to(places(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    return positions, segment_ids


def cache_from(latents: Stacks[Latents], capacity: int) -> Stacks[Latents]:
    """A cache for ``capacity`` tokens that begins with the latents of a forward pass."""

    def extend(x: Array) -> Array:  # [L, B, T, ...]
        return jnp.pad(x, [(0, 0), (0, 0), (0, capacity - x.shape[2])] + [(0, 0)] * (x.ndim - 3))

    return jax.tree.map(extend, latents)
