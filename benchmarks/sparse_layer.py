"""Attention of one layer on CPU, sparse and dense, as the sequence grows; beside it PyTorch's own attention.

    pip install -e '.[bench]' && python benchmarks/sparse_layer.py

16 heads and 8 index heads, the other widths as in the 671B model, k = 512, float32, the forward pass from queries
and latents to the outputs of the heads. Sparse is index scores, selection, and attention to what was selected; dense
unfolds the latents and attends to all earlier keys, as does PyTorch, whose fused kernel wants values as wide as keys:
they are padded. The programs run in turn, and each number is the median of the rounds.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from alternate import alternate, ratio
from flax import nnx

from dsjax.config import presets
from dsjax.models.indexer import IndexQuery
from dsjax.models.mla import Latents, MultiHeadLatentAttention, Queries
from dsjax.observe.throughput import peak_flops
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.visibility import Visibility

CONFIG = dataclasses.replace(
    presets.deepseek_v32_671b(),
    hidden_size=256,  # of projections, which are not measured
    num_attention_heads=16,
    index_n_heads=8,
    index_topk=512,
    compute_dtype="float32",
    dense_attention_max_length=0,
)
PROGRAMS = ("index scores", "sparse", "dense", "PyTorch")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", type=Path, help="a file for the seconds of every round")
    arguments = parser.parse_args()
    seconds = {}
    for length in arguments.lengths:
        programs = programs_of(length)
        chosen = {name: programs[name] for name in arguments.programs}
        seconds[length] = alternate(chosen, rounds=arguments.rounds)
        row = "".join(
            f"{name} {np.median(s):8.2f} s ({1e6 * np.median(s) / length:6.0f} us a token)   "
            for name, s in seconds[length].items()
        )
        print(f"{length:6} tokens: {row}", flush=True)
    report(seconds)
    if arguments.json:
        written = {
            length: {name: list(values) for name, values in row.items()} for length, row in seconds.items()
        }
        arguments.json.write_text(json.dumps(written, indent=1))


def programs_of(length: int):
    """What is timed, on the same random numbers."""
    keys = jax.random.split(jax.random.key(0), 6)
    heads, index_heads = CONFIG.num_attention_heads, CONFIG.index_n_heads

    def normal(key, *shape):
        return jax.random.normal(key, (1, length, *shape), jnp.float32)

    queries = Queries(
        normal(keys[0], heads, CONFIG.qk_nope_head_dim),
        normal(keys[1], heads, CONFIG.qk_rope_head_dim),
        IndexQuery(normal(keys[2], index_heads, CONFIG.index_head_dim), normal(keys[2], index_heads)),
    )
    latents = Latents(
        normal(keys[3], CONFIG.kv_lora_rank),
        normal(keys[4], CONFIG.qk_rope_head_dim),
        normal(keys[5], CONFIG.index_head_dim),
    )
    dense_queries = queries._replace(indexer=None)
    sparse_layer = MultiHeadLatentAttention(CONFIG, rngs=nnx.Rngs(0))
    dense_layer = MultiHeadLatentAttention(dataclasses.replace(CONFIG, index_topk=0), rngs=nnx.Rngs(0))
    segments = jnp.ones((1, length), jnp.int32)

    @jax.jit
    def attend(layer, queries, latents):
        return layer.attend(queries, latents, segments)[0]

    @jax.jit
    def scores(index, index_key):
        """A number of each block, so that the scores need not be kept."""
        block = CONFIG.attention_block_size

        def of_block(start):
            q, w = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in index)
            number = start + jnp.arange(block, dtype=jnp.int32)[None]
            visibility = Visibility(number, jnp.ones_like(number), segments)
            return jnp.max(index_scores(q, index_key, w, visibility))

        return jax.lax.map(of_block, jnp.arange(0, length, block))

    rng = np.random.default_rng(0)
    shape = (1, heads, length, CONFIG.qk_head_dim)
    theirs = [torch.tensor(rng.standard_normal(shape, np.float32)) for _ in range(3)]

    def sdpa():
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True)

    return {
        "index scores": lambda: jax.block_until_ready(scores(queries.indexer, latents.index_key)),
        "sparse": lambda: jax.block_until_ready(attend(sparse_layer, queries, latents)),
        "dense": lambda: jax.block_until_ready(attend(dense_layer, dense_queries, latents)),
        "PyTorch": sdpa,
    }


def report(seconds: dict[int, dict[str, np.ndarray]]) -> None:
    """The ratios that matter."""
    shortest, longest = min(seconds), max(seconds)
    last = seconds[longest]
    if {"sparse", "index scores"} <= last.keys() and shortest != longest:
        growth = {
            name: np.median(last[name]) / np.median(seconds[shortest][name]) * shortest / longest
            for name in ("sparse", "index scores")
        }
        print(
            f"time a token from {shortest} to {longest} tokens: index scores x {growth['index scores']:.2f}, sparse "
            f"x {growth['sparse']:.2f}, which is {growth['sparse'] / growth['index scores']:.2f} of it"
        )
    for slow, fast in (("dense", "sparse"), ("dense", "PyTorch")):
        if {slow, fast} <= last.keys():
            print(
                f"at {longest} tokens {slow} takes {ratio(last[slow], last[fast]):.2f} times as long as {fast}"
            )
    print(f"large matrix product: {peak_flops(jax.devices()[0]).flops_per_second / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
