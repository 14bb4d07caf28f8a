"""Imported checkpoints, read back through orbax, against numpy written from the format."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from replica import SMALL_CONFIG, SMALL_CONFIG_V3, all_stored_arrays, dequantised, our_tree, write_random

from dsjax.checkpoint import stacked
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint
from dsjax.checkpoint.store import CheckpointStore, named_leaves
from dsjax.models.transformer import Transformer

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def abstract_model(directory: Path) -> Transformer:
    config = read_config(directory).model.freeze()
    return jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def restored(target: Path, abstract: Transformer) -> dict[str, np.ndarray]:
    store = CheckpointStore(target, keep=None)
    model = store.restore_part(store.latest_step, abstract, prefix="model")
    store.close()
    return {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "fp8", None])
@pytest.mark.parametrize("config", [SMALL_CONFIG, SMALL_CONFIG_V3], ids=["V3.2", "V3"])
def test_equals_numpy_bit_for_bit(tmp_path, config, dtype):
    source, target = tmp_path / "hf", tmp_path / "ours"
    write_random(source, config)
    import_checkpoint(source, target, dtype=dtype)
    ours = restored(target, abstract_model(source))
    expected = our_tree(dequantised(source), config)
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        if (
            value.ndim > 1
            and dtype in DTYPES
            and not path.endswith(("norm.weight", "correction_bias", "k_norm.bias"))
        ):
            value = value.astype(DTYPES[dtype]).astype(np.float32)
        assert ours[path].dtype == np.float32
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    assert not target.with_name("ours.partial").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("vocab", [512, 515])
@pytest.mark.parametrize(("largest", "grouped"), [(20_000, 10_000), (1 << 20, 1)])
def test_however_the_arrays_are_cut(tmp_path, monkeypatch, dtype, largest, grouped, vocab):
    """Matrices in several parts of whole blocks and heads, a few tensors a chunk or one, converted in pieces."""
    config = SMALL_CONFIG | {"vocab_size": vocab}
    monkeypatch.setattr(stacked, "CONVERTED_ELEMENTS", 50_000)
    monkeypatch.setattr(stacked, "_LARGEST_CHUNK_BYTES", largest)
    monkeypatch.setattr(stacked, "_GROUPED_CHUNK_BYTES", grouped)
    source, target = tmp_path / "hf", tmp_path / "ours"
    write_random(source, config)
    import_checkpoint(source, target, dtype=dtype)
    state = target / "checkpoints" / "0" / "state"
    parts = {
        name: len(list((state / f"model.{name}").rglob("c/**/*")))
        for name in ("embed_tokens", "lm_head.weight")
    }
    # 512 rows in parts of at least one block
    assert (parts["embed_tokens"] > 4) == (largest == 20_000 and vocab == 512)
    heads = json.loads((state / "model.moe_layers.self_attn.indexer.wq_b.weight" / "zarr.json").read_text())
    assert (heads["chunk_grid"]["configuration"]["chunk_shape"][2] < 32) == (largest == 20_000)
    ours, expected = restored(target, abstract_model(source)), our_tree(dequantised(source), config)
    for path, value in expected.items():
        if dtype == "bfloat16" and not path.endswith(("norm.weight", "correction_bias", "k_norm.bias")):
            value = value.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    export_checkpoint(target, tmp_path / "back", dtype=dtype)
    if dtype == "fp8":
        before, after = all_stored_arrays(source), all_stored_arrays(tmp_path / "back")
        assert all(after[name][1].tobytes() == array.tobytes() for name, (_, array) in before.items())
    else:
        after = our_tree(dequantised(tmp_path / "back"), config)
        for path, value in ours.items():
            np.testing.assert_array_equal(after[path], value, err_msg=path)
