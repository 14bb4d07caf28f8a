"""Exported directories against what was imported, and against numpy."""

import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from replica import SMALL_CONFIG, SMALL_CONFIG_V3, all_stored_arrays, dequantised, our_tree, write_random
from small_model import random_model

from dsjax.checkpoint import stacked, stored_arrays
from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_checkpoint import open_sound_checkpoint
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint
from dsjax.checkpoint.store import CheckpointStore, named_leaves
from dsjax.checkpoint.workdir import claim
from dsjax.config import RunConfig
from dsjax.models.transformer import Transformer

BOTH = pytest.mark.parametrize("config", [SMALL_CONFIG, SMALL_CONFIG_V3], ids=["V3.2", "V3"])


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@BOTH
def test_fp8_in_and_out_changes_no_bit(tmp_path, config):
    write_random(tmp_path / "hf", config)
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype="fp8")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype="fp8", shard_bytes=1_000_000)
    open_sound_checkpoint(tmp_path / "back")
    theirs, back = all_stored_arrays(tmp_path / "hf"), all_stored_arrays(tmp_path / "back")
    assert theirs.keys() == back.keys()
    for name, (dtype, array) in theirs.items():
        assert back[name][0] == dtype, name
        assert same_bits(back[name][1], array), name
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 10
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert values == config | {"torch_dtype": "bfloat16"}


@BOTH
@pytest.mark.parametrize("imported", ["fp8", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_matrices_in_full_precision(tmp_path, config, imported, dtype):
    write_random(tmp_path / "hf", config)
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype=imported)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype=dtype)
    open_sound_checkpoint(tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    back = all_stored_arrays(tmp_path / "back")
    expected = dequantised(tmp_path / "hf")
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        if dtype == "bfloat16" and value.ndim == 2:
            value = value.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(
            np.asarray(back[name][1], np.float32), np.asarray(value, np.float32), name
        )


def test_quantised_here_keeps_values_that_fp8_can_hold(tmp_path):
    write_random(tmp_path / "hf", SMALL_CONFIG)  # scales are powers of two
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype="float32")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype="fp8")
    open_sound_checkpoint(tmp_path / "back")
    before, after = dequantised(tmp_path / "hf"), dequantised(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)


def test_quantised_here_is_within_half_a_step_of_e4m3(tmp_path):
    write_random(tmp_path / "hf", SMALL_CONFIG_V3)  # scales are any numbers
    import_checkpoint(tmp_path / "hf", tmp_path / "float", dtype="float32")
    export_checkpoint(tmp_path / "float", tmp_path / "plain", dtype="float32")
    import_checkpoint(tmp_path / "plain", tmp_path / "fp8", dtype="fp8")
    export_checkpoint(tmp_path / "fp8", tmp_path / "back")
    before, after = dequantised(tmp_path / "plain"), dequantised(tmp_path / "back")
    back = all_stored_arrays(tmp_path / "back")
    for name, value in before.items():
        if back[name][0] == "F8_E4M3":
            rows, columns = np.indices(value.shape)
            scale = np.asarray(back[f"{name}_scale_inv"][1])
            for block in np.ndindex(scale.shape):
                inside = (rows // 128 == block[0]) & (columns // 128 == block[1])
                assert scale[block] == np.abs(value[inside]).max() / np.float32(448)
            spread = scale[rows // 128, columns // 128]
            step = np.maximum(
                np.abs(value) * 2.0**-4, spread * 2.0**-10
            )  # half a step of normals, of subnormals
            assert (np.abs(after[name] - value) <= step * 1.001).all(), name
        elif back[name][0] == "F32":
            np.testing.assert_array_equal(after[name], value, name)


class Saved(NamedTuple):
    model: Transformer
    step: jax.Array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_newest_checkpoint_of_a_run(tmp_path, monkeypatch, dtype):
    for module in (stacked, stored_arrays):
        monkeypatch.setattr(module, "CONVERTED_ELEMENTS", 50_000)  # larger tensors are read in pieces
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(SMALL_CONFIG))
    config = read_config(tmp_path / "hf").model
    workdir = tmp_path / "run"
    (workdir / "data").mkdir(parents=True)
    (workdir / "data" / "tokenizer.json").write_text("{}")
    claim(RunConfig(model=config), workdir)
    store = CheckpointStore(workdir, keep=2)
    for step in (3, 7):
        model = random_model(config.freeze(), seed=step)
        store.save(step, Saved(model, jnp.int32(step)))
    store.close()
    export_checkpoint(workdir, tmp_path / "back", dtype=dtype, shard_bytes=3_000_000)
    assert open_sound_checkpoint(tmp_path / "back").config.model.hidden_size == 320
    # It came from nowhere, and says all that a released one does.
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    told = SMALL_CONFIG.keys() - {"quantization_config", "initializer_range"}
    assert {name: values.get(name) for name in told} == {name: SMALL_CONFIG[name] for name in told}
    ours = our_tree(dequantised(tmp_path / "back"), SMALL_CONFIG)
    leaves = named_leaves(model)
    assert ours.keys() == leaves.keys()
    for path, leaf in leaves.items():
        value = np.asarray(leaf)
        if dtype == "bfloat16" and not path.endswith(("norm.weight", "norm.bias", "correction_bias")):
            value = value.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(ours[path], value, path)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert "PreTrainedTokenizerFast" in (tmp_path / "back" / "tokenizer_config.json").read_text()


def test_a_new_indexer_is_like_the_rest_of_the_checkpoint(tmp_path):
    write_random(tmp_path / "hf", SMALL_CONFIG_V3)
    import_checkpoint(tmp_path / "hf", tmp_path / "fp8", new_indexer=True)
    export_checkpoint(tmp_path / "fp8", tmp_path / "fp8_back")
    values = json.loads((tmp_path / "fp8_back" / "config.json").read_text())
    assert "scale_fmt" not in values["quantization_config"]  # V3's scales are any numbers
    assert (
        all_stored_arrays(tmp_path / "fp8_back")["model.layers.0.self_attn.indexer.wk.weight"][0] == "F8_E4M3"
    )
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "bf16", dtype="bfloat16")
    import_checkpoint(tmp_path / "bf16", tmp_path / "with_indexer", new_indexer=True)
    export_checkpoint(tmp_path / "with_indexer", tmp_path / "back")
    assert {dtype for dtype, _ in all_stored_arrays(tmp_path / "back").values()} == {"BF16", "F32"}


def test_v31_has_no_indexer_and_scales_that_are_powers_of_two(tmp_path):
    quantization = SMALL_CONFIG["quantization_config"]
    write_random(tmp_path / "hf", SMALL_CONFIG_V3 | {"quantization_config": quantization})
    for _, array in all_stored_arrays(tmp_path / "hf", "r+").values():
        if array.dtype == ml_dtypes.float8_e4m3fn:  # nothing above 0.75 of the largest number
            codes = array.view(np.uint8)
            codes[codes & 0x7F > 0x78] &= 0xF0
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype="float32")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype="fp8")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"] == quantization
    before, after = dequantised(tmp_path / "hf"), dequantised(tmp_path / "back")
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)


@pytest.mark.parametrize("dtype", ["fp8", "float32"])
@pytest.mark.parametrize(
    "name", ["model.lm_head.weight", "model.mtp.layer.self_attn.o_proj.weight_scale_inv"]
)
def test_a_missing_chunk_is_no_zeros(tmp_path, name, dtype):
    write_random(tmp_path / "hf", SMALL_CONFIG)
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    chunk = next(
        path for path in (tmp_path / "ours/checkpoints/0/state" / name).rglob("c/**/*") if path.is_file()
    )
    chunk.unlink()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype=dtype)
    assert not (tmp_path / "back").exists()
