"""Checkpoints straight into device arrays, on one device and over meshes of eight."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from replica import SMALL_CONFIG, SMALL_CONFIG_V3, dequantised, our_tree, write_random

from dsjax.checkpoint.hf_checkpoint import open_sound_checkpoint
from dsjax.checkpoint.hf_config import with_new_indexer
from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint
from dsjax.checkpoint.hf_load import load_arrays
from dsjax.checkpoint.store import named_leaves, placed
from dsjax.models.transformer import Transformer

REPOSITORY = Path(__file__).parents[3]


def wanted(config) -> dict[str, jax.ShapeDtypeStruct]:
    return placed(named_leaves(jax.eval_shape(lambda: Transformer(config.freeze(), rngs=nnx.Rngs(0)))))


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("config", [SMALL_CONFIG, SMALL_CONFIG_V3], ids=["V3.2", "V3"])
def test_equals_numpy(tmp_path, config, dtype):
    directory = tmp_path / "hf"
    write_random(directory, config)
    if dtype != "fp8":
        import_checkpoint(directory, tmp_path / "ours")
        directory = tmp_path / "unquantised"
        export_checkpoint(tmp_path / "ours", directory, dtype=dtype)
    checkpoint = open_sound_checkpoint(directory)
    expected = our_tree(dequantised(directory), config)
    loaded = dict(load_arrays(checkpoint, wanted(checkpoint.config.model)))
    assert loaded.keys() == expected.keys()
    for path, value in expected.items():
        assert loaded[path].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[path], value, path)


@pytest.mark.parametrize("stored", ["fp8", "bfloat16", "float32"])
def test_a_new_indexer_is_fresh_and_the_same_as_the_imported_one(tmp_path, stored):
    write_random(tmp_path / "fp8", SMALL_CONFIG_V3)
    import_checkpoint(tmp_path / "fp8", tmp_path / "stored", dtype=stored)
    export_checkpoint(tmp_path / "stored", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", new_indexer=True)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    checkpoint = open_sound_checkpoint(tmp_path / "hf")
    checkpoint = checkpoint._replace(config=with_new_indexer(checkpoint.config))
    direct = dict(load_arrays(checkpoint, wanted(checkpoint.config.model)))
    imported = dict(load_arrays(open_sound_checkpoint(tmp_path / "back"), wanted(checkpoint.config.model)))
    assert direct.keys() == imported.keys()
    for path in direct:
        np.testing.assert_array_equal(direct[path], imported[path], path)
    weights = np.asarray(direct["moe_layers.self_attn.indexer.wq_b.weight"])  # three layers
    assert weights.shape == (3, 48, 64, 128)
    np.testing.assert_allclose(weights.std(axis=(1, 2, 3)), 0.006, rtol=0.02)
    assert not np.array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(direct["moe_layers.self_attn.indexer.k_norm.weight"], 1)
    np.testing.assert_array_equal(direct["mtp.layer.self_attn.indexer.k_norm.bias"], 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_on_a_mesh_every_shard_reads_its_own_bytes(tmp_path, processes):
    write_random(tmp_path / "hf", SMALL_CONFIG)
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers")]),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = [sys.executable, str(REPOSITORY / "tests" / "helpers" / "load_on_mesh.py")]
    arguments = [str(tmp_path / "hf"), str(tmp_path / "ours"), address, str(processes)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([*script, *arguments, str(index)], env=environment, **pipes)
        for index in range(processes)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
            assert "every shard is right" in output
    finally:
        for process in running:
            process.kill()
