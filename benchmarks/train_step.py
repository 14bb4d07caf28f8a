"""Training step on CPU: ours and transformers', the same model and batch, in turn.

    pip install -e '.[bench]' && python benchmarks/train_step.py

Forward, backward, clipping and AdamW in float32. The peer has no clipping, balance loss or bias update; ours does
all of them. The last column is the share of a large matrix product's speed, measured in the same run, that the
model's own FLOPs reach.
"""

import argparse

import jax
import numpy as np
import torch
from alternate import alternate, ratio
from peer import build_peer
from small_run import batch_of

from dsjax.config import RunConfig, TrainConfig, presets
from dsjax.observe.model_flops import train_flops_per_token
from dsjax.observe.throughput import peak_flops
from dsjax.train.state import initial_state
from dsjax.train.step import build_train_step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()

    train = TrainConfig(batch_size=arguments.batch, sequence_length=arguments.length, indexer_loss_weight=0)
    config = RunConfig(model=presets.v32_small(), train=train)
    config.check()
    config.freeze()
    state = initial_state(config)
    peer = build_peer(state.model).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (arguments.batch, arguments.length + 1), dtype=np.int32)
    batch, theirs = batch_of(tokens), torch.tensor(tokens[:, :-1], dtype=torch.long)
    step = jax.jit(build_train_step(config), donate_argnums=0)

    def ours() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    def transformers() -> None:
        peer(input_ids=theirs, labels=theirs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = alternate({"ours": ours, "transformers": transformers}, rounds=arguments.rounds)
    peak = peak_flops(jax.devices()[0]).flops_per_second
    count = arguments.batch * arguments.length
    flops = count * train_flops_per_token(config.model, arguments.length)
    print(f"{'':14}{'s a step':>10}{'min':>8}{'max':>8}{'tokens/s':>10}{'GFLOP/s':>9}{'of matmul':>10}")
    for name, values in seconds.items():
        median = np.median(values)
        speed = f"{count / median:10.0f}{flops / median / 1e9:9.0f}{flops / median / peak:10.0%}"
        print(f"{name:14}{median:10.2f}{values.min():8.2f}{values.max():8.2f}{speed}")
    print(f"large matrix product: {peak / 1e9:.0f} GFLOP/s")
    print(
        f"ours is {ratio(seconds['transformers'], seconds['ours']):.2f} times as fast (median of the rounds)"
    )


if __name__ == "__main__":
    main()
