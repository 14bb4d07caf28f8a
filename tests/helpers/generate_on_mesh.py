"""Greedy tokens on one device and on meshes of eight; one JSON object of lists, by mesh and length of the prompt."""

import functools
import json

import jax
import numpy as np
from flax import nnx
from small_model import random_model, small_config

from dsjax.config import MeshConfig
from dsjax.inference.generate import generate
from dsjax.models.transformer import Transformer
from dsjax.parallel.mesh import build_mesh
from dsjax.parallel.placement import placed, whole_array

MESHES = ({"context": 4, "fsdp": 2}, {"context": 2, "tensor": 2, "expert": 2})
LENGTHS = (80, 81)  # shared out over context and tensor, and not; both longer than what a query selects


def main() -> None:
    """Prints."""
    config = small_config(dense_attention_max_length=0).freeze()
    model = random_model(config)
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 512, (1, max(LENGTHS))).astype(np.int32)
    write = functools.partial(generate, key=jax.random.key(0), max_new_tokens=8, temperature=0.0)
    found = {
        f"one device, {length}": np.asarray(write(model, tokens[:, :length])).tolist() for length in LENGTHS
    }
    for sizes in MESHES:
        mesh = build_mesh(MeshConfig(**sizes))
        there = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), model, placed(abstract, mesh))
        with jax.set_mesh(mesh):
            for length in LENGTHS:
                found[f"{sizes}, {length}"] = whole_array(write(there, tokens[:, :length]), mesh).tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
