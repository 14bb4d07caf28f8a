"""Which models have golden logits in ``tests/golden``, and at which positions."""

from small_model import small_config

from dsjax.config import ModelConfig

LENGTH = 300
# The first token, both sides of the length of the selection (64), some between, and the end.
POSITIONS = [0, 1, 62, 63, 64, 65, 127, 128, 200, 255, 256, 298, 299]
CASES = {
    "v32": {},
    "v32_yarn": {"max_position_embeddings": 163840},
    "v3_yarn": {"max_position_embeddings": 163840, "index_topk": 0},
}


def golden_config(name: str) -> ModelConfig:
    return small_config(**CASES[name])
