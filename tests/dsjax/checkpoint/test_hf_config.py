"""Configurations as DeepSeek publishes them and as transformers writes them."""

import copy
import json

import pytest
from replica import V32_CONFIG
from replica import V32_CONFIG as RELEASED

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_config import read_config
from dsjax.config import ModelConfig, presets


def read(directory, changes: dict, without: tuple[str, ...] = ()):
    values = copy.deepcopy(RELEASED) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in without}))
    return read_config(directory)


def test_the_released_v32(tmp_path):
    found = read(tmp_path, {})
    assert found.model == presets.deepseek_v32_671b()
    assert found.is_fp8


def test_v3_has_no_indexer(tmp_path):
    without = ("index_topk", "index_n_heads", "index_head_dim", "quantization_config")
    found = read(tmp_path, {"model_type": "deepseek_v3"}, without)
    assert found.model == presets.deepseek_v3_671b()
    assert not found.is_fp8


def test_no_scaling_is_no_yarn_at_any_length(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    model = read(tmp_path, {"rope_parameters": rope}, ("rope_scaling", "rope_theta")).model
    assert not model.uses_yarn
    assert model.rope_theta == 5000
    assert model.softmax_scale == ModelConfig().qk_head_dim ** -0.5


YARN = V32_CONFIG["rope_scaling"]


def test_what_transformers_adds_to_yarn_is_understood(tmp_path):
    rope = YARN | {"rope_type": "yarn", "rope_theta": 10000.0, "attention_factor": None, "truncate": True}
    found = read(tmp_path, {"rope_parameters": rope}, ("rope_scaling", "rope_theta"))
    assert found.model == presets.deepseek_v32_671b()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not one of deepseek_v32, deepseek_v3"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ({"hidden_size": "big"}, "model.hidden_size='big' must be a whole number"),
        ({"n_group": 7}, "model.n_group=7 does not divide"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type='linear' is not one of default, yarn"),
        ({"rope_scaling": {"factor": 40}}, "rope_scaling.type=None is not one of"),
        (
            {"rope_scaling": YARN | {"attention_factor": 0.5}},
            "attention_factor=0.5 is not supported: only None",
        ),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate=False is not supported"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1}}, "rope_scaling.low_freq_factor is not known here"),
        (
            {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 0}},
            "rope_scaling.mscale=0 must be positive",
        ),
        (
            {"rope_scaling": {name: YARN[name] for name in YARN if name != "mscale"}},
            "rope_scaling.mscale is missing",
        ),
        ({"max_position_embeddings": 4096}, "4096 is not more than the 4096 that YaRN extends"),
        ({"rope_interleave": False}, "rope_interleave=False is not supported: only True"),
        ({"rope_scaling": [1]}, "rope_scaling=\\[1\\] must be an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "only fp8 in blocks of 128 by 128"),
    ],
)
def test_another_architecture_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        read(tmp_path, changes)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_a_missing_field_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="q_lora_rank, vocab_size is missing"):
        read(tmp_path, {}, ("vocab_size", "q_lora_rank"))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_config(tmp_path)
