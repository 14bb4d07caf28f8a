"""The accelerators' own compilers take every kernel at the released model's sizes, and fill the machine with it.

Needs libtpu, which lives in a virtual environment of its own: where it is installed, jax looks for a TPU.
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
NAMES = ("index_scores", "sparse_mla", "sparse_mla_backward", "indexer_loss", "dense_mla", "dense_mla_dkv")
LEAST_MXU = {
    "v5p": (0.90, 0.80, 0.93, 0.87, 0.68, 0.84),
    "v6e": (0.82, 0.50, 0.84, 0.68, 0.32, 0.58),
    "tpu7x": (0.81, 0.42, 0.79, 0.53, 0.32, 0.47),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("chip", VMEM_MIB)
def test_tpu(chip):
    found = subprocess.run(
        [sys.executable, PROGRAM, chip, "--json"], capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stderr[-3000:]
    kernels = {kernel["kernel"]: kernel for kernel in json.loads(found.stdout)}
    print(subprocess.list2cmdline([PROGRAM.name, chip]))
    for name, kernel in kernels.items():
        print(f"{name:24}{kernel['vmem_bytes'] / 2**20:8.1f} MiB{kernel['bundles']:8}", kernel["filled"])
        assert kernel["vmem_bytes"] < VMEM_MIB[chip] * 2**20
    for name, least in zip(NAMES, LEAST_MXU[chip], strict=True):
        assert kernels[name]["filled"]["MXU"] > least, name
