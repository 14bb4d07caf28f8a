"""The chosen experts on meshes of eight devices and on one: ``python tests/helpers/experts_on_mesh.py``

Prints one JSON object: for each case how far output and gradients are from those of one device.
"""

import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from numerics import quick_jit
from small_run import small_model

from dsjax.config import ModelConfig
from dsjax.config.mesh import MeshConfig
from dsjax.models.experts import DOWN_AXES, UP_AXES, Routing, chosen_experts
from dsjax.parallel.mesh import build_mesh
from dsjax.parallel.rules import layout

B, T, D, F, E, K = 8, 48, 128, 16, 32, 4
MESHES = {
    "expert": {"expert": 8},
    "expert and tensor": {"expert": 4, "tensor": 2},
    "all": {"fsdp": 2, "expert": 2, "context": 1, "tensor": 2},
    "fsdp": {"fsdp": 8},
}
AXES = (("batch", "length"), ("batch", "length"), ("batch", "length"), UP_AXES, UP_AXES, DOWN_AXES)


def chosen(load: str, rng: np.random.Generator) -> jax.Array:
    """Experts of every token, all different: of even loads, or all but some tokens of the same four."""
    if load == "even":
        experts = np.argsort(rng.random((B, T, E)), axis=-1)[..., :K]
    else:
        experts = np.broadcast_to(np.arange(4, 4 + K), (B, T, K)).copy()
        experts[3, ::5] = np.argsort(rng.random((10, E - 8)), axis=-1)[:, :K] + 8  # and 0 to 3 have none
    return jnp.asarray(experts, jnp.int32)


@functools.partial(quick_jit, static_argnums=0)
def output_and_gradients(config: ModelConfig, d_y, experts, x, weights, *matrices) -> Any:
    """Of ``Σ y · d_y``."""

    def loss(x, weights, matrices):
        y = chosen_experts(x, Routing(experts, weights, jnp.zeros((B, T, E))), matrices, config)
        return jnp.sum(y * d_y), y

    (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, weights, matrices)
    return y, gradients


def main() -> None:
    """Every mesh, exchange, load and capacity."""
    # What is not written is not read: what nobody sent must not matter.
    jax.lax.empty = lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)
    rng = np.random.default_rng(0)
    d_y = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    shapes = ((B, T, D), (B, T, K), (E, D, F), (E, D, F), (E, F, D))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    found: dict[str, dict] = {}
    for load in ("even", "four"):
        arguments = [chosen(load, rng), *arrays]
        wanted = jax.tree.leaves(output_and_gradients(small_model().freeze(), d_y, *arguments))
        for name, exchange, capacity in itertools.product(MESHES, ("ragged", "gathered"), (1.5, 0.3)):
            config = small_model(expert_exchange=exchange, expert_capacity=capacity).freeze()
            mesh = build_mesh(MeshConfig(**({"fsdp": 1} | MESHES[name])))
            with jax.set_mesh(mesh):
                specs = (layout(a.shape, *axes) for a, axes in zip(arguments, AXES, strict=True))
                there = [
                    jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, specs, strict=True)
                ]
                got = jax.tree.leaves(output_and_gradients(config, d_y, *there))
            gate = there[3].addressable_shards[0].data
            found[f"{load}, {name}, {exchange}, {capacity}"] = {
                "differ": [
                    float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, wanted, strict=True)
                ],
                "share": gate.size / arrays[2].size,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
