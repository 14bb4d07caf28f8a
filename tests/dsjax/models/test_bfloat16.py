"""Compiling in bfloat16, which jaxlib does by other means than in float32."""

import subprocess
import sys
from pathlib import Path

_FORWARD = """
import sys
sys.path[:0] = [{repository!r}, {folder!r}]
import numpy as np
from small_model import logits_of, random_model, random_tokens, small_config
model = random_model(small_config(compute_dtype="bfloat16", attention_block_size=400))
print(np.isfinite(logits_of(model, random_tokens(model.config, (1, 300)))).all())
"""


def test_a_length_below_the_block_size_runs():
    """In a process of its own, since what can go wrong is a segmentation fault.

    jaxlib 0.12.0.1 on CPUs fuses the indexer's head weights, a product in bfloat16, with the padding of the
    queries and the sum over heads, and the result reads memory it should not.
    """
    repository = Path(__file__).parents[3]
    program = _FORWARD.format(repository=str(repository), folder=str(repository / "tests" / "helpers"))
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout.strip()) == (0, "True"), finished.stderr[-2000:]
