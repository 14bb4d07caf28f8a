"""Multi-head latent attention with DeepSeek sparse attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.models.causal_blocks import map_causal_blocks
from dsjax.models.indexer import IndexQuery, LightningIndexer
from dsjax.models.linear import Linear, linear
from dsjax.models.norms import RMSNorm
from dsjax.models.rope import Rope, rotate_interleaved
from dsjax.parallel.collectives import gather, per_device
from dsjax.parallel.order import in_order, places
from dsjax.parallel.rules import layout, names_at
from pallas_kernels.blocks import round_up
from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.platform import target
from pallas_kernels.residuals import SELECTION
from pallas_kernels.selection import BITS
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import select, topk_indices, topk_mask
from pallas_kernels.visibility import Visibility

# Blocks of queries that TPUs score one by one and attend to at once: for each call keys are packed, and gradients of
# all of them added up.
_BLOCKS_AT_ONCE = {"tpu": 4}
_LATENT_EPS = 1e-6  # whatever rms_norm_eps is. Source: the released code and transformers


class Latents(NamedTuple):
    """What attention keeps of a token: the whole cache of a layer. ``index_key`` is None without an indexer."""

    c: Float[Array, "B S C"]  # normalised key-value latent
    k_pe: Float[Array, "B S R"]  # rotary key, shared by all heads
    index_key: Float[Array, "B S J"] | None


class Queries(NamedTuple):
    """What a token asks: per head, without and with position, and of the index."""

    nope: Float[Array, "B T H P"]
    pe: Float[Array, "B T H R"]
    indexer: IndexQuery | None


class _BlockQueries(NamedTuple):
    """Queries of one block with their place in the sequence."""

    queries: Queries
    number: Int[Array, "B T"]
    segment: Int[Array, "B T"]


class _Keys(NamedTuple):
    """What the absorbed form reads of the tokens that may be attended to."""

    kv: Float[Array, "B S C+R"]
    index_key: Float[Array, "B S J"] | None
    segment: Int[Array, "B S"]


class _Tokens(NamedTuple):
    """All that may be attended to, in their order."""

    latents: Latents
    segment_ids: Int[Array, "B S"]


class _How(NamedTuple):
    """``in_stretches``: queries are all of a sequence's, so that early ones may be given few keys."""

    with_loss: bool
    in_stretches: bool


class MultiHeadLatentAttention(nnx.Module):
    """MLA over the keys that the lightning indexer selects, or over all where there is no indexer.

    Two forms give the same result. MHA: keys and values of every head are unfolded from the latent and attended
    to under a mask; cheaper per pair, used up to ``dense_attention_max_length``. MQA: W_UK is absorbed into the
    query and W_UV into the output, and each query gathers its selected latents; used beyond, and for decoding.

    Source: V2 report §2.1, V3.2-Exp report §1; checkpoint keys ``self_attn.*``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, std, dtype = config.num_attention_heads, config.initializer_range, config.param_dtype

        def projection(shape, axes, contract=1, *, keep=False):
            return Linear(shape, axes, std=std, param_dtype=dtype, rngs=rngs, contract=contract, keep=keep)

        self.q_a_proj = projection((config.hidden_size, config.q_lora_rank), ("embed", "q_lora"), keep=True)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=_LATENT_EPS, axis="q_lora")
        self.q_b_proj = projection(
            (config.q_lora_rank, heads, config.qk_head_dim), ("q_lora", "heads", "head_dim")
        )
        self.kv_a_proj_with_mqa = projection(
            (config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim),
            ("embed", "kv_lora"),
            keep=True,
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=_LATENT_EPS, axis="kv_lora")
        self.kv_b_proj = projection(
            (config.kv_lora_rank, heads, config.qk_nope_head_dim + config.v_head_dim),
            ("kv_lora", "heads", "head_dim"),
        )
        self.o_proj = projection(
            (heads, config.v_head_dim, config.hidden_size),
            ("heads", "head_dim", "embed"),
            contract=2,
            keep=True,
        )
        self.indexer = LightningIndexer(config, rngs=rngs) if config.has_indexer else None

    def project(self, x: Float[Array, "B T D"], rope: Rope) -> tuple[Queries, Latents]:
        """Queries of the tokens ``x`` and what attention keeps of them."""
        config = self.config
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        nope, pe = jnp.split(self.q_b_proj(q_latent), [config.qk_nope_head_dim], axis=-1)
        c, k_pe = jnp.split(self.kv_a_proj_with_mqa(x), [config.kv_lora_rank], axis=-1)
        index = self.indexer.query(x, q_latent, rope) if self.indexer else None
        index_key = self.indexer.key(x, rope) if self.indexer else None
        queries = Queries(nope, rotate_interleaved(pe, rope), index)
        return queries, Latents(self.kv_a_layernorm(c), rotate_interleaved(k_pe, rope), index_key)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        segment_ids: Int[Array, "B T"],
        *,
        with_indexer_loss: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Latents]:
        """Attention of a sequence to itself: output, indexer KL of each token (0 where not asked for), latents.

        Segment 0 is padding; tokens of different segments do not see each other.
        """
        queries, latents = self.project(x, rope)
        # The selection carries no gradient: without the loss there is none to compute.
        if not with_indexer_loss:
            index, index_key = jax.lax.stop_gradient((queries.indexer, latents.index_key))
            queries, latents = queries._replace(indexer=index), latents._replace(index_key=index_key)
        o, kl = self.attend(queries, latents, segment_ids, with_indexer_loss=with_indexer_loss)
        return self.o_proj(o), kl, latents

    def attend(
        self,
        queries: Queries,
        latents: Latents,
        segment_ids: Int[Array, "B T"],
        *,
        with_indexer_loss: bool = False,
    ) -> tuple[Float[Array, "B T H V"], Float[Array, "B T"]]:
        """Outputs of the heads and indexer KL, from the projections of a sequence.

        On a mesh, tokens are in the order of ``parallel.order``: a device has all heads of its own queries, and is
        given the latents of all tokens, in their order, so that every query selects as it would on one device.
        """
        length = segment_ids.shape[1]
        number = jnp.broadcast_to(places(length), segment_ids.shape)
        block_queries = _BlockQueries(queries, number, segment_ids)
        is_dense = length <= self.config.dense_attention_max_length or not self.indexer
        place = layout(segment_ids.shape, "batch", "length")
        over = names_at(place, 1)

        def own(queries: _BlockQueries, latents: Latents, segment_ids: Array, kv_b: Array):
            tokens = in_order(jax.tree.map(lambda x: gather(x, over, 1), _Tokens(latents, segment_ids)))
            attend = self._attend_mha if is_dense else self._attend_mqa
            return attend(queries, tokens, kv_b, _How(with_indexer_loss, in_stretches=not over))

        arguments = block_queries, latents, segment_ids, self.kv_b_proj.weight[...]
        specs = jax.tree.map(lambda x: PartitionSpec(*place, *[None] * (x.ndim - 2)), arguments[:3])
        out = PartitionSpec(*place, None, None), place
        return per_device(own, (*specs, PartitionSpec()), out)(*arguments)

    def decode(
        self, x: Float[Array, "B T D"], rope: Rope, number: Int[Array, "B T"], cache: Latents
    ) -> tuple[Float[Array, "B T D"], Latents]:
        """Attention of new tokens to a cache, in MQA form; returns the output and the cache with them in it.

        ``number`` is the place of each token in its sequence, which is also its place in the cache.
        """
        queries, new = self.project(x, rope)
        rows = jnp.arange(x.shape[0])[:, None]
        cache = jax.tree.map(
            lambda old, update: old.at[rows, number].set(update.astype(old.dtype)), cache, new
        )
        everyone = jnp.ones(cache.c.shape[:2], jnp.int32)
        block = _BlockQueries(queries, number, jnp.ones_like(number))
        keys = _Keys(_rows(cache), cache.index_key, everyone)
        place = layout(number.shape, "batch")

        def own(block: _BlockQueries, keys: _Keys, kv_b: Array) -> Array:
            return self._sparse_block(block, keys, kv_b, with_loss=False)[0]

        o = per_device(own, (place, place, PartitionSpec()), place)(block, keys, self.kv_b_proj.weight[...])
        return self.o_proj(o), cache

    def selected(
        self, x: Float[Array, "B T D"], rope: Rope, segment_ids: Int[Array, "B T"]
    ) -> Int[Array, "B T K"]:
        """The keys that each token of ``x`` attends to: ascending indices, -1 where there are fewer than k."""
        queries, latents = self.project(x, rope)
        number = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), segment_ids.shape)
        visibility = Visibility(number, segment_ids, segment_ids)
        return self._select(queries.indexer, latents.index_key, visibility, topk_indices)

    def _select(self, index: IndexQuery | None, index_key: Array | None, visibility: Visibility, topk=select):
        """The selected keys in the form that ``topk`` gives; without an indexer all visible ones."""
        if index is None or index_key is None:
            scores = jnp.where(visibility.mask(), 0.0, -jnp.inf)
            return topk(scores, scores.shape[-1])
        index, index_key = jax.lax.stop_gradient((index, index_key))
        scores = index_scores(index.q, index_key, index.w, visibility)
        return checkpoint_name(topk(scores, min(self.config.index_topk, scores.shape[-1])), SELECTION)

    def _select_in_blocks(self, queries: _BlockQueries, keys: _Keys):
        """The selected keys of all queries; of not so many queries at a time, as there is a score for each key."""

        def select_keys(block: _BlockQueries, keys: _Keys):
            visibility = Visibility(block.number, block.segment, keys.segment)
            return self._select(block.queries.indexer, keys.index_key, visibility)

        block = _scored_at_once(self.config)
        return map_causal_blocks(select_keys, queries, lambda _: keys, block=block, stretches=1)

    def _attend_mha(self, queries: _BlockQueries, tokens: _Tokens, kv_b: Array, how: _How):
        """Keys and values unfolded once, masked attention in blocks; heads before tokens, as products like it."""
        config, scale, (latents, segment_ids) = self.config, self.config.softmax_scale, tokens
        k_nope, v = jnp.split(linear(latents.c, kv_b), [config.qk_nope_head_dim], axis=-1)
        k_pe = jnp.broadcast_to(latents.k_pe[:, :, None], (*k_nope.shape[:-1], config.qk_rope_head_dim))
        k = jnp.concatenate([k_nope, k_pe], axis=-1).swapaxes(1, 2)
        v = v.swapaxes(1, 2)

        def keys_up_to(n: int):
            index_key = None if latents.index_key is None else latents.index_key[:, :n]
            return k[:, :, :n], v[:, :, :n], index_key, segment_ids[:, :n]

        def attend(block: _BlockQueries, keys):
            k, v, index_key, key_segment = keys
            q = jnp.concatenate([block.queries.nope, block.queries.pe], axis=-1).swapaxes(1, 2)
            visibility = Visibility(block.number, block.segment, key_segment)
            index, kl = block.queries.indexer, _no_loss(block.number)
            if (
                index is not None
                and index_key is not None
                and (how.with_loss or k.shape[2] > config.index_topk)
            ):
                scores = index_scores(index.q, index_key, index.w, visibility)
                selected = checkpoint_name(topk_mask(scores, config.index_topk), SELECTION)
                o, lse = dense_mla(q, k, v, visibility, selected, scale=scale)
                if how.with_loss:
                    kl = dense_indexer_loss(scores, q, k, lse, visibility, selected, scale=scale)
            else:
                o, _ = dense_mla(q, k, v, visibility, scale=scale)
            return o.swapaxes(1, 2), kl

        block = self.config.attention_block_size
        return _map_blocks(attend, queries, keys_up_to, block, segment_ids.shape[1], how)

    def _attend_mqa(self, queries: _BlockQueries, tokens: _Tokens, kv_b: Array, how: _How):
        """Selected latents gathered, in blocks."""
        keys = _Keys(_rows(tokens.latents), tokens.latents.index_key, tokens.segment_ids)

        def keys_up_to(n: int):
            return jax.tree.map(lambda x: x[:, :n], keys)

        def attend(block: _BlockQueries, keys: _Keys):
            return self._sparse_block(block, keys, kv_b, with_loss=how.with_loss)

        block = _scored_at_once(self.config) * _BLOCKS_AT_ONCE.get(target(), 1)
        return _map_blocks(attend, queries, keys_up_to, block, tokens.segment_ids.shape[1], how)

    def _sparse_block(self, block: _BlockQueries, keys: _Keys, kv_b: Array, *, with_loss: bool):
        """One block of queries over the keys it selects, in absorbed form: head outputs and indexer KL."""
        config, kv = self.config, keys.kv
        dtype = block.queries.nope.dtype
        w_uk, w_uv = jnp.split(kv_b.astype(dtype), [config.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([_of_each_head(block.queries.nope, "chp->hpc", w_uk), block.queries.pe], axis=-1)
        index, index_key = block.queries.indexer, keys.index_key
        selection = self._select_in_blocks(block, keys)
        scale = config.softmax_scale
        o_latent, lse = sparse_mla(q, kv, selection, latent_dim=config.kv_lora_rank, scale=scale)
        o = _of_each_head(o_latent, "chv->hcv", w_uv)
        if index is None or index_key is None or not with_loss:
            return o, _no_loss(block.number)
        return o, sparse_indexer_loss(index.q, index_key, index.w, q, kv, lse, selection, scale=scale)


def _map_blocks(attend, queries: _BlockQueries, keys_up_to, block: int, length: int, how: _How):
    """Over blocks of queries; where these are of the beginning and the end of a sequence, each with all keys."""
    if how.in_stretches:
        return map_causal_blocks(attend, queries, keys_up_to, block=block)
    return map_causal_blocks(attend, queries, lambda _: keys_up_to(length), block=block, stretches=1)


def _scored_at_once(config: ModelConfig) -> int:
    """Queries that are scored at a time, in whole words of a packed mask."""
    return round_up(config.attention_block_size, BITS)


def _of_each_head(
    x: Float[Array, "B T H X"], order: str, weight: Float[Array, "C H P"]
) -> Float[Array, "B T H Y"]:
    """The product with each head's own matrix, which ``order`` takes out of the weight, in the dtype of ``x``.

    Heads first and features last, so that XLA on CPUs moves whole rows and turns nothing over.
    """
    y = jnp.einsum(
        "hbtx,hxy->hbty", jnp.moveaxis(x, 2, 0), jnp.einsum(order, weight), preferred_element_type=jnp.float32
    )
    return jnp.moveaxis(y, 0, 2).astype(x.dtype)


def _rows(latents: Latents) -> Float[Array, "B S C+R"]:
    """Latent and rotary key side by side, as all heads see them."""
    return jnp.concatenate([latents.c, latents.k_pe], axis=-1)


def _no_loss(number: Int[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.zeros(number.shape, jnp.float32)
