"""Logits against those of transformers, stored by ``tests/golden/make_golden.py``: parity without PyTorch."""

from pathlib import Path

import numpy as np
import pytest
from golden_cases import CASES, LENGTH, POSITIONS, golden_config
from numerics import relative
from small_model import logits_of, random_model, random_tokens, with_config

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(
    ("name", "dense_attention_max_length"),
    [(name, length) for name in CASES for length in (LENGTH, 64) if length == LENGTH or name != "v3_yarn"],
)
def test_logits(name, dense_attention_max_length):
    golden = np.load(GOLDEN / f"{name}.npz")
    config, seed = golden_config(name), int(golden["seed"])
    how = {"dense_attention_max_length": dense_attention_max_length, "attention_block_size": 160}
    model = with_config(random_model(config, seed), **how)
    logits = logits_of(model, random_tokens(config, (1, LENGTH), seed))
    assert relative(logits[0, np.array(POSITIONS)], golden["logits"]) < 1e-5
