"""Writes the golden logits of this folder from transformers, for machines without PyTorch.

    python tests/golden/make_golden.py

Weights and tokens are not stored: ``small_model.random_model`` and ``random_tokens`` make them again from the
seed. The seed is the first whose closest pair of scores at the k-th place is still far enough apart, so that
every right program selects the same keys.
"""

import sys
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS.parent), str(TESTS / "helpers")]

from golden_cases import CASES, LENGTH, POSITIONS, golden_config  # noqa: E402
from small_model import random_model, random_tokens, seed_with_margin  # noqa: E402
from transformers_model import hf_model  # noqa: E402

MARGIN = 1e-5


def main() -> None:
    for name in CASES:
        config = golden_config(name)
        seed = seed_with_margin(config, (1, LENGTH), MARGIN)
        tokens = random_tokens(config, (1, LENGTH), seed)
        with torch.no_grad():
            logits = hf_model(random_model(config, seed))(torch.tensor(tokens, dtype=torch.long)).logits
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(path, seed=seed, logits=logits[0, POSITIONS].numpy())
        print(f"{path.name}: seed {seed}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
