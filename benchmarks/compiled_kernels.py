"""Kernels compiled for accelerators that this machine does not have: do they fit, and how well are they scheduled?

    pip install 'jax[tpu]' && python benchmarks/compiled_kernels.py v5p

Everything that a layer of the 671B model runs at 128K tokens, forward and backward, goes through the accelerator's
own compiler. The table says for each TPU kernel how much VMEM it takes, how many instruction bundles its hottest loop
has, and which share of the slots for matrix products, vector arithmetic, loads and stores they fill. Bundles are
counted, not timed: waiting for memory is not in them.
"""

import argparse
import collections
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SLOTS = ("MXU", "VALU", "VLOAD", "VSTORE")
HEADS, LATENT, ROPE, INDEX_HEADS, INDEX_DIM, TOPK = 128, 512, 64, 64, 128, 2048
NOPE, VALUE = 128, 128
DENSE_HEADS = 32  # of a device: the keys of 128 heads, 48 KB a token, are for more than one at this length
KERNELS = {
    "sparse": (
        "index_scores",
        "topk_threshold",
        "topk_pack",
        "sparse_mla",
        "sparse_mla_backward",
        "indexer_loss",
        "indexer_loss_backward",
    ),
    "dense": (
        "index_scores_dq",
        "index_scores_dk",
        "dense_mla",
        "dense_mla_dq",
        "dense_mla_dkv",
        "indexer_loss_target",
    ),
}


class Kernel(NamedTuple):
    """What the compiler made of one kernel."""

    program: str
    kernel: str
    vmem_bytes: int
    bundles: int  # of the hottest loop
    filled: dict[str, float]  # share of its slots


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chip", choices=TOPOLOGIES)
    parser.add_argument("--queries", type=int, default=1024, help="of a block of attention")
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--json", action="store_true", help="one object a kernel, in place of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE="v5p-8",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        )
        kernels = []
        for program in KERNELS:
            before = set(Path(dump).iterdir())
            compile_program(arguments.chip, program, arguments.queries, arguments.keys)
            kernels += read_dump(program, set(Path(dump).iterdir()) - before)
    if arguments.json:
        print(json.dumps([kernel._asdict() for kernel in kernels]))
        return
    header = "".join(f"{slot:>8}" for slot in SLOTS)
    print(f"{arguments.chip}: {arguments.queries} queries, {arguments.keys} keys")
    print(f"{'':8}{'kernel':24}{'VMEM MiB':>9}{'bundles':>9}{header}")
    for kernel in kernels:
        shares = "".join(f"{kernel.filled[slot]:8.0%}" for slot in SLOTS)
        print(
            f"{kernel.program:8}{kernel.kernel:24}{kernel.vmem_bytes / 2**20:9.1f}{kernel.bundles:9}{shares}"
        )


def compile_program(chip: str, program: str, queries: int, keys: int):
    """A layer's attention, forward and backward, for one chip; jax is imported after the environment is set."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from pallas_kernels.dense_mla.api import dense_mla
    from pallas_kernels.indexer.api import index_scores
    from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
    from pallas_kernels.sparse_mla.api import sparse_mla
    from pallas_kernels.topk.api import select, topk_mask
    from pallas_kernels.visibility import Visibility

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    b16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    limits = Visibility(of(i32, queries), of(i32, queries), of(i32, keys))
    index = (
        of(b16, queries, INDEX_HEADS, INDEX_DIM),
        of(b16, keys, INDEX_DIM),
        of(f32, queries, INDEX_HEADS),
    )
    scale = (NOPE + ROPE) ** -0.5

    def sparse(index, q, kv, limits):
        scores = index_scores(*jax.lax.stop_gradient(index), limits)
        selection = select(scores, TOPK)
        o, lse = sparse_mla(q, kv, selection, latent_dim=LATENT, scale=scale)
        return jnp.sum(o.astype(f32)) + jnp.sum(
            sparse_indexer_loss(*index, q, kv, lse, selection, scale=scale)
        )

    def dense(index, q, k, v, limits):
        scores = index_scores(*index, limits)
        selected = topk_mask(scores, TOPK)
        o, lse = dense_mla(q, k, v, limits, selected, scale=scale)
        loss = dense_indexer_loss(scores, q, k, lse, limits, selected, scale=scale)
        return jnp.sum(o.astype(f32)) + jnp.sum(loss)

    if program == "sparse":
        width = LATENT + ROPE
        arrays = (index, of(b16, queries, HEADS, width), of(b16, keys, width), limits)
        function = jax.grad(sparse, argnums=(0, 1, 2))
    else:
        shapes = ((queries, NOPE + ROPE), (keys, NOPE + ROPE), (keys, VALUE))
        arrays = (index, *(of(b16, DENSE_HEADS, *shape) for shape in shapes), limits)
        function = jax.grad(dense, argnums=(0, 1, 2, 3))
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(function, in_shardings=whole, out_shardings=whole).lower(*arrays).compile()


def read_dump(program: str, files: set[Path]) -> list[Kernel]:
    """The kernels of a program from what the compiler wrote down, by their names within those of transformations."""
    stages = collections.defaultdict(dict)
    for path in files:
        match = re.match(r"\d+-(?:jvp_|transpose_)*(\w+?)_*(?:\.\d+)?-\d+-(.+)\.txt", path.name)
        if match:
            stages[match[1]][match[2]] = path
    kernels = []
    for name in KERNELS[program]:
        of_kernel = stages[name]
        bundles = of_kernel["final_bundles"], of_kernel["final_hlo-static-per-bundle-utilization"]
        kernels.append(
            Kernel(program, name, vmem_bytes(of_kernel["original"].read_text()), *hottest_loop(*bundles))
        )
    return kernels


def vmem_bytes(original: str) -> int:
    """All that a kernel asks for in vector memory: scratch, and two buffers of every block."""
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", original))


def hottest_loop(bundles: Path, utilization: Path) -> tuple[int, dict[str, float]]:
    """Bundles of the loop with most work at the greatest depth, and the share of each kind of slot they fill."""
    depths = [
        line.split("{")[0].count(">")
        for line in bundles.read_text().splitlines()
        if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line)
    ]
    capacity, rows = {}, []
    lines = iter(utilization.read_text().splitlines())
    for line in lines:
        if line.startswith("MXU,"):
            capacity = dict(zip(line.split(", "), map(int, next(lines).split()), strict=True))
        elif capacity and re.match(r"\d", line):
            rows.append(dict(zip(capacity, map(int, line.split()), strict=True)))
    regions = []
    for depth, row in zip(depths, rows, strict=True):
        if not regions or regions[-1][0] != depth:
            regions.append((depth, []))
        regions[-1][1].append(row)
    work = max((rows for _, rows in regions), key=lambda rows: sum(r["MXU"] * 1000 + r["VALU"] for r in rows))
    return len(work), {slot: sum(r[slot] for r in work) / capacity[slot] / len(work) for slot in SLOTS}


if __name__ == "__main__":
    main()
