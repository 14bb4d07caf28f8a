"""A small model with every part of V3.2 and nothing zero in it, and what the tests do with it."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numerics import quick_jit

from dsjax.config import ModelConfig, presets
from dsjax.models.rope import rope_at
from dsjax.models.transformer import Transformer
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.visibility import Visibility


@quick_jit
def call(module, *args):
    """``module(*args)``, its parameters an argument: ``jit(module)`` would remember their old values."""
    return module(*args)


def small_config(**changes) -> ModelConfig:
    """Three layers, the first dense; 64 selected keys, a context of 2048 and hence no YaRN."""
    small = dataclasses.replace(
        presets.v32_tiny(),
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=3,
        num_nextn_predict_layers=0,
        max_position_embeddings=2048,
        num_attention_heads=4,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_n_heads=32,
        index_head_dim=32,
        index_topk=64,
        intermediate_size=512,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
    )
    config = dataclasses.replace(small, **changes)
    config.check()
    return config


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter is random, norms and router biases included.

    The values follow from the seed and the parameter's path alone, by numpy's frozen generator, so that
    golden files need not store them.
    """
    return fill(config, lambda path, shape: random_values(path, shape, seed))


def random_values(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """What ``random_model`` puts at ``path``."""
    generator = np.random.RandomState(zlib.crc32(f"{seed} {path}".encode()))
    noise = generator.standard_normal(shape)
    if path.endswith("norm.weight"):
        return 1 + 0.2 * noise
    return 0.05 * noise


def fill(config: ModelConfig, values) -> Transformer:
    """A model of ``values(path, shape)``; initialising one first would only be compiled and thrown away."""
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    structure = jax.tree.structure(abstract)
    leaves = [
        jnp.asarray(values(path, variable.shape), variable.dtype) for path, variable in variables(abstract)
    ]
    return jax.tree.unflatten(structure, leaves)


def with_config(model: Transformer, **changes) -> Transformer:
    """The same parameters under a configuration that differs in how it is computed."""
    config = dataclasses.replace(model.config, **changes)
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


def variables(tree) -> list[tuple[str, nnx.Variable]]:
    """The variables of a module or of its gradient, with dotted paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [
        (".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path), leaf)
        for path, leaf in leaves
    ]


def random_tokens(config: ModelConfig, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, config.vocab_size, shape).astype(np.int32)


@quick_jit
def logits_of(model: Transformer, tokens, positions=None, segment_ids=None):
    return model.logits(model(tokens, positions, segment_ids).hidden)


def next_token_loss(model: Transformer, tokens) -> jax.Array:
    """Mean cross entropy of every token but the first."""
    logits = model.logits(model(tokens).hidden)[:, :-1]
    predicted = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - predicted)


def through_layers(model: Transformer, function, tokens, positions=None, segment_ids=None) -> list:
    """``function(layer, x, rope, segment_ids)`` of every layer, x being its input; one result a stack."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    rope = rope_at(positions, model.config)

    def step(x, layer):
        return layer(x, rope, segment_ids)[0], function(layer, x, rope, segment_ids)

    x, results = model.embed(tokens), []
    for layers in (model.dense_layers, model.moe_layers):
        if layers is not None:
            x, result = jax.lax.scan(step, x, layers)
            results.append(result)
    return results


def selection_margin(layer, x, rope) -> jax.Array:
    """How far the last selected key is above the first that is not, in the closest row of a layer.

    As a share of the largest score in the row. Unless it is well above the rounding of float32, two right
    programs select different keys and no longer agree to better than a few thousandths.
    """
    attn, x = layer.self_attn, layer.input_layernorm(x)
    k = attn.config.index_topk
    query = attn.indexer.query(x, attn.q_a_layernorm(attn.q_a_proj(x)), rope)
    number, segment = (
        jnp.broadcast_to(jnp.asarray(n, jnp.int32), x.shape[:2]) for n in (jnp.arange(x.shape[1]), 1)
    )
    visibility = Visibility(number, segment, segment)
    scores = index_scores(query.q, attn.indexer.key(x, rope), query.w, visibility)
    largest = jnp.max(jnp.where(visibility.mask(), jnp.abs(scores), 0), axis=-1)
    best = jax.lax.top_k(scores, k + 1)[0]
    gap = (best[..., k - 1] - best[..., k]) / largest
    return jnp.min(jnp.where(jnp.arange(scores.shape[1]) >= k, gap, jnp.inf))


@quick_jit
def smallest_margin(model: Transformer, tokens, positions=None) -> jax.Array:
    """``selection_margin`` of the closest layer."""

    def margin(layer, x, rope, segment_ids):
        return selection_margin(layer, x, rope)

    return jnp.min(jnp.concatenate(through_layers(model, margin, tokens, positions)))


def seed_with_margin(
    config: ModelConfig, shape: tuple[int, int], margin: float, positions=None, first: int = 0
) -> int:
    """The first seed from ``first`` on whose random model selects every key of random tokens by that margin."""
    if not 0 < config.index_topk < shape[1]:
        return first
    for seed in range(first, first + 1000):
        if (
            smallest_margin(random_model(config, seed), random_tokens(config, shape, seed), positions)
            > margin
        ):
            return seed
    raise AssertionError(f"no seed with a margin of {margin} among a thousand")
