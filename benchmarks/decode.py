"""Greedy decoding on CPU: ours and transformers', the same model and prompts, in turn.

    pip install -e '.[bench]' && python benchmarks/decode.py

Batch 2, 512 tokens of prompt, 64 new tokens, float32, caches on both sides. Prefill is included.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch
from alternate import alternate, ratio
from flax import nnx
from peer import build_peer

from dsjax.config import presets
from dsjax.inference.generate import generate
from dsjax.models.transformer import Transformer


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()

    config = presets.v32_small().freeze()
    key = jax.random.key(0, impl="rbg")
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(key)))()
    peer = build_peer(model)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (arguments.batch, arguments.prompt), dtype=np.int32)
    device_prompts, theirs = jnp.asarray(prompts), torch.tensor(prompts, dtype=torch.long)
    written = {}

    def ours() -> None:
        tokens = generate(model, device_prompts, key, max_new_tokens=arguments.new, temperature=0)
        written["ours"] = np.asarray(tokens)

    def transformers() -> None:
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            tokens = peer.generate(theirs, max_new_tokens=arguments.new, **settings)
        written["transformers"] = tokens[:, arguments.prompt :].numpy()

    seconds = alternate({"ours": ours, "transformers": transformers}, rounds=arguments.rounds)
    print(f"{'':14}{'s':>8}{'min':>8}{'max':>8}{'new tokens/s':>14}")
    for name, values in seconds.items():
        median = np.median(values)
        speed = arguments.batch * arguments.new / median
        print(f"{name:14}{median:8.2f}{values.min():8.2f}{values.max():8.2f}{speed:14.1f}")
    same = np.mean(written["ours"] == written["transformers"])
    print(f"same tokens: {same:.0%}")
    print(
        f"ours is {ratio(seconds['transformers'], seconds['ours']):.2f} times as fast (median of the rounds)"
    )


if __name__ == "__main__":
    main()
