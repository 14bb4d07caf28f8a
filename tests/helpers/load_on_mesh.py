"""One process of a mesh of eight devices loads a released checkpoint and looks at its shards and at what it read.

``python tests/helpers/load_on_mesh.py HF IMPORTED ADDRESS PROCESSES INDEX``
"""

import collections
import math
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from replica import dequantised, our_tree

from dsjax.checkpoint import hf_load
from dsjax.checkpoint.hf_checkpoint import open_sound_checkpoint
from dsjax.checkpoint.safetensors_files import StoredTensor
from dsjax.checkpoint.store import CheckpointStore, from_named_leaves, named_leaves
from dsjax.models.transformer import Transformer

RULES = {"embed": "x", **dict.fromkeys(("experts", "heads", "index_heads", "vocab", "mlp"), "y")}


def sharding(mesh: jax.sharding.Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """By the rules, each mesh axis once, where it divides the array's."""
    spec: list[str | None] = []
    for axis, length in zip(axes, shape, strict=True):
        over = RULES.get(axis)
        spec.append(over if over and over not in spec and length % mesh.shape[over] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def check(found: dict[str, jax.Array], wanted: dict, expected: dict[str, np.ndarray]) -> None:
    """Every shard that lies here, against numpy."""
    for name, value in expected.items():
        assert found[name].sharding.is_equivalent_to(wanted[name].sharding, value.ndim), name
        for shard in found[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index], name)


def main() -> None:
    """Ends well where everything holds."""
    hf, imported = map(Path, sys.argv[1:3])
    processes, index = map(int, sys.argv[4:])
    if processes > 1:
        jax.distributed.initialize(sys.argv[3], processes, index, initialization_timeout=60)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    checkpoint = open_sound_checkpoint(hf)
    config = checkpoint.config.model.freeze()
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    axes = {".".join(map(str, path)): leaf.axes for path, leaf in nnx.to_flat_state(nnx.state(model))}
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, axes[name], leaf.shape))
        for name, leaf in named_leaves(model).items()
    }
    assert sum(not leaf.sharding.is_fully_replicated for leaf in wanted.values()) > 20

    read: collections.Counter[StoredTensor] = collections.Counter()
    inner = hf_load.read_region

    def counted(stored: StoredTensor, rows: slice, columns: slice | None = None) -> np.ndarray:
        region = inner(stored, rows, columns)
        read[stored] += region.nbytes
        return region

    hf_load.read_region = counted
    expected = our_tree(dequantised(hf), checkpoint.config.values)
    check(dict(hf_load.load_arrays(checkpoint, wanted)), wanted, expected)
    # Split over all devices, a tensor is read once by all processes together: no shard reads another's bytes.
    whole = (3, 4, 32, 320)
    part = wanted["moe_layers.self_attn.o_proj.weight"].sharding.shard_shape(whole)
    assert part == (3, 1, 32, 160)
    stored = checkpoint.stored["model.layers.1.self_attn.o_proj.weight"]
    assert read[stored] * processes == stored.size, read[stored]
    here = len(jax.local_devices()) * math.prod(part) / math.prod(whole)
    assert read[stored] == stored.size * here

    store = CheckpointStore(imported, keep=None)
    restored = store.restore_part(0, from_named_leaves(model, wanted), prefix="model")
    check(named_leaves(restored), wanted, expected)
    print("every shard is right", flush=True)


if __name__ == "__main__":
    main()
