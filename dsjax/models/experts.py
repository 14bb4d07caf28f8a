"""The experts that tokens chose, wherever on the mesh they lie."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.models.expert_rounds import How, Matrices, experts_in_rounds
from dsjax.parallel.collectives import gather, per_device, place_along, scatter_sum, whole_in
from dsjax.parallel.rules import layout, names_at
from pallas_kernels import platform
from pallas_kernels.expert_mlp.api import expert_mlp

UP_AXES, DOWN_AXES = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")


class Routing(NamedTuple):
    """Where each token goes."""

    experts: Int[Array, "*B K"]
    weights: Float[Array, "*B K"]  # float32
    scores: Float[Array, "*B E"]  # sigmoid of the router logits, float32


def chosen_experts(
    x: Float[Array, "B T D"],
    routing: Routing,
    matrices: Matrices,
    config: ModelConfig,
    *,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """``expert_mlp`` of tokens that keep their axes, accumulated and returned in float32.

    On a mesh a device has some of the experts. ``config.expert_exchange`` says how tokens come to them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        tokens, experts, weights = (a.reshape(-1, a.shape[-1]) for a in (x, routing.experts, routing.weights))
        return expert_mlp(tokens, experts, weights, *matrices, layer=layer).reshape(x.shape)
    if layer is not None:
        matrices = jax.tree.map(lambda stack: stack[layer], matrices)
    gate, up, down = matrices
    place = PartitionSpec(*layout(x.shape[:2], "batch", "length"), None)
    up_lies, down_lies = layout(up.shape, *UP_AXES), layout(down.shape, *DOWN_AXES)
    group = names_at(up_lies, 0)

    def own(x, experts, weights, *matrices):
        tokens, experts, weights = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights))
        how = How(
            group,
            max(1, math.ceil(config.expert_capacity * experts.size)),
            PartitionSpec(None, *up_lies[1:]),
            PartitionSpec(None, *down_lies[1:]),
        )
        run = _with_all_here if not group else experts_in_rounds if _by_rounds(config) else _by_gathering
        return run(how, tokens, experts, weights, matrices).astype(jnp.float32).reshape(x.shape)

    specs = place, place, place, up_lies, up_lies, down_lies
    return per_device(own, specs, place)(x, routing.experts, routing.weights, gate, up, down)


def _with_all_here(how: How, x: Array, experts: Array, weights: Array, matrices: Matrices) -> Array:
    """Every device has all experts, but for parts of their matrices."""
    return expert_mlp(x, experts, weights, *_gathered(how, matrices, x.dtype))


def _gathered(how: How, matrices: Matrices, dtype: jnp.dtype) -> Matrices:
    gate, up, down = matrices
    gate, up = (whole_in(matrix, how.up_lies, dtype) for matrix in (gate, up))
    return gate, up, whole_in(down, how.down_lies, dtype)


def _by_rounds(config: ModelConfig) -> bool:
    if config.expert_exchange == "auto":
        return platform.target() != "cpu"
    return config.expert_exchange == "ragged"


def _by_gathering(how: How, x: Array, experts: Array, weights: Array, matrices: Matrices) -> Array:
    """As ``experts_in_rounds``, by giving every device of the group all tokens, a block of them at a time."""
    matrices = _gathered(how, matrices, x.dtype)
    of_device, devices = matrices[0].shape[0], jax.lax.axis_size(how.names)
    block = max(1, how.capacity // (experts.shape[1] * devices))
    blocks = -(-x.shape[0] // block)

    def run(tokens: tuple[Array, Array, Array]) -> Array:
        x, experts, weights = (gather(a, how.names, 0) for a in tokens)
        own = experts - place_along(how.names) * of_device
        is_own = (own >= 0) & (own < of_device)
        own, weights = jnp.where(is_own, own, of_device), jnp.where(is_own, weights, 0)  # of_device is nobody
        return scatter_sum(expert_mlp(x, own, weights, *matrices), how.names, 0)

    def cut(a: Array) -> Array:
        return jnp.pad(a, ((0, blocks * block - a.shape[0]), (0, 0))).reshape(blocks, block, -1)

    y = jax.lax.map(jax.checkpoint(run), (cut(x), cut(experts), cut(weights)))
    return y.reshape(blocks * block, -1)[: x.shape[0]]
