"""The accelerators' own compilers take every kernel at the released model's sizes, and fill the machine with it.

They need packages that live in a virtual environment of their own: where libtpu is installed, jax looks for a TPU.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "compiled_kernels.py"
VMEM_MIB = {"v5p": 64, "v6e": 128, "tpu7x": 64}  # of a core
# Share of the slots for matrix products in the hottest loop, a little below what was seen on 2026-11-22.
NAMES = (
    ("sparse", "index_scores"),
    ("sparse", "sparse_mla"),
    ("sparse", "sparse_mla_backward"),
    ("sparse", "indexer_loss"),
    ("dense", "dense_mla"),
    ("dense", "dense_mla_dkv"),
    ("fp8", "fp8_matmul"),
    ("experts", "gmm"),
)
LEAST_MXU = {
    "v5p": (0.90, 0.80, 0.93, 0.87, 0.68, 0.84, 0.85, 0.93),
    "v6e": (0.82, 0.50, 0.84, 0.68, 0.32, 0.58, 0.80, 0.82),
    "tpu7x": (0.81, 0.42, 0.79, 0.53, 0.32, 0.47, 0.38, 0.75),
}
# Attention to gathered rows on GPUs: each warpgroup has its own keys, and copies are not asynchronous for it.
GATHERING = {("sparse", "sparse_mla"), ("decode", "paged_sparse_mla")}
pytestmark = pytest.mark.slow


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def compiled(chip: str, folder: Path) -> dict[tuple[str, str], dict]:
    """What the program says of each kernel; prints its table."""
    command = [sys.executable, PROGRAM, chip, "--json", folder / "kernels.json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    kernels = json.loads((folder / "kernels.json").read_text())
    return {(kernel["program"], kernel["kernel"]): kernel for kernel in kernels}


@needs("libtpu")
@pytest.mark.parametrize("chip", VMEM_MIB)
def test_tpu(chip, tmp_path):
    kernels = compiled(chip, tmp_path)
    assert all(kernel["vmem_bytes"] < VMEM_MIB[chip] * 2**20 for kernel in kernels.values())
    for name, least in zip(NAMES, LEAST_MXU[chip], strict=True):
        assert kernels[name]["filled"]["MXU"] > least, name


@needs("jax_cuda12_plugin")
def test_h100(tmp_path):
    kernels = compiled("h100", tmp_path)
    assert len(kernels) >= 23
    assert all(
        kernels["sparse", name]["relaxed"] for name in ("sparse_mla_dkv", "listed_index_scores_backward")
    )
    for name, kernel in kernels.items():
        assert kernel["spilt_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= 227 * 1024, kernel
        assert kernel["ordered"] == 0, kernel
        if name in GATHERING:
            assert kernel["products"] == 36 + 4, kernel  # of 576 / 16 and 64 / 16, by each warpgroup
        elif name[1] != "topk_indices":
            assert kernel["products"], kernel
            assert kernel["copies"], kernel
