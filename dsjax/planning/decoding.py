"""One token of every sequence, as it is to be compiled for a mesh."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dsjax.config import ModelConfig
from dsjax.models.mla import Latents
from dsjax.models.transformer import Stacks, Transformer, cache_from
from dsjax.parallel.placement import placed
from dsjax.parallel.rules import layout


class Decoding(NamedTuple):
    """What stays from token to token."""

    model: Transformer
    cache: Stacks[Latents]


def abstract_decoding(model: ModelConfig, mesh: Mesh, sequences: int, capacity: int) -> Decoding:
    """Bfloat16 parameters, and a cache of so many tokens for each sequence; sequences lie where batches do."""
    config = dataclasses.replace(model, param_dtype=model.compute_dtype, num_nextn_predict_layers=0).freeze()
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))

    def prefilled(model: Transformer) -> Stacks[Latents]:
        return cache_from(model(jnp.zeros((sequences, 1), jnp.int32), inference=True).latents, capacity)

    with jax.set_mesh(mesh):
        rows = layout((sequences,), "batch")

    def lies(x: Any) -> Any:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, *rows))
        )

    return Decoding(placed(abstract, mesh), jax.tree.map(lies, jax.eval_shape(prefilled, abstract)))


def lowered_decode(state: Decoding, mesh: Mesh, sequences: int) -> jax.stages.Lowered:
    """The likeliest next token of each sequence, the cache donated."""

    def step(model: Transformer, cache: Stacks[Latents], token: Int[Array, "B"], number: Int[Array, "B"]):
        hidden, cache = model.decode(token[:, None], number[:, None], cache)
        return jnp.argmax(model.logits(hidden[:, 0]), axis=-1), cache

    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, layout((sequences,), "batch"))
        numbers: Any = jax.ShapeDtypeStruct((sequences,), jnp.int32, sharding=rows)
        out = rows, jax.tree.map(lambda x: x.sharding, state.cache)
        return jax.jit(step, donate_argnums=1, out_shardings=out).lower(*state, numbers, numbers)
