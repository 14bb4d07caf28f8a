"""``python -m dsjax.checkpoint.convert``: targets, names, flags, and what comes with the weights."""

import json
import os
import subprocess

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from convert_program import REPOSITORY, command, run
from replica import SMALL_CONFIG, SMALL_CONFIG_V3, stored_arrays, write_random

from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint


@pytest.mark.parametrize("command", ["import", "export"])
def test_an_existing_target_is_left_alone(hf, monkeypatch, capsys, command):
    target = hf.parent / "there"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    source = hf
    if command == "export":
        source = hf.parent / "ours"
        import_checkpoint(hf, source)
        capsys.readouterr()
    assert run(monkeypatch, command, "--source", source, "--target", target) == 1
    assert capsys.readouterr().err == f"{target} exists: name a new folder, or move it away\n"
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_names_of_folders_may_begin_with_a_tilde(hf, monkeypatch):
    monkeypatch.setenv("HOME", str(hf.parent))
    assert run(monkeypatch, "import", "--source", "~/hf", "--target", "~/ours") == 0
    assert run(monkeypatch, "export", "--source", "~/ours", "--target", "~/back") == 0
    assert (hf.parent / "back" / "config.json").exists()


def test_nothing_is_exported_among_checkpoints(hf, monkeypatch, capsys):
    import_checkpoint(hf, hf.parent / "ours")
    target = hf.parent / "ours" / "checkpoints" / "7"
    assert run(monkeypatch, "export", "--source", hf.parent / "ours", "--target", target) == 1
    assert f"{target} lies among the checkpoints of" in capsys.readouterr().err


def test_a_pipe_is_no_file(hf, monkeypatch, capsys):
    for name in ("tokenizer.json", "config.json"):
        (hf / name).unlink(missing_ok=True)
        os.mkfifo(hf / name)
        assert run(monkeypatch, "import", "--source", hf, "--target", hf.parent / "ours") == 1
        assert str(hf / name) in capsys.readouterr().err


def test_checkpoints_that_lack_what_can_be_done_without(hf, monkeypatch, capsys):
    """No multi-token prediction, norms in BF16, and a table that transformers once saved."""
    import_checkpoint(hf, hf.parent / "ours")
    tensors = {
        name: np.asarray(array)
        for path in hf.glob("*.safetensors")
        for name, (_, array) in stored_arrays(path).items()
        if not name.startswith(f"model.layers.{SMALL_CONFIG['num_hidden_layers']}.")
    }
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = tensors[norm].astype(ml_dtypes.bfloat16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    for path in hf.glob("*.safetensors*"):
        path.unlink()
    safetensors.numpy.save_file(tensors, hf / "model.safetensors")
    assert run(monkeypatch, "inspect", hf) == 0
    import_checkpoint(hf, hf.parent / "less")
    state = hf.parent / "less" / "checkpoints" / "0" / "state"
    assert not list(state.glob("model.mtp*"))
    name = "model.dense_layers.input_layernorm.weight/c/0/0"
    assert (state / name).read_bytes() == tensors[norm].astype(np.float32).tobytes()


def test_an_indexer_is_not_added_to_one(hf, monkeypatch, capsys):
    assert run(monkeypatch, "import", "--source", hf, "--target", hf.parent / "ours", "--new-indexer") == 1
    assert "has an indexer" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "5 parsecs", "-1GB", "GB", "5PB", "0.2"])
def test_a_shard_size_that_is_none(monkeypatch, capsys, size):
    assert run(monkeypatch, "export", "--source", "x", "--target", "y", f"--shard-size={size}") == 2
    assert "is not a size: write 5GB, 500MB or 2GiB" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_nothing(hf):
    target = hf.parent / "ours"
    piped = ["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "bash"]
    for each in (("import", "--source", hf, "--target", target), ("inspect", hf)):
        result = subprocess.run([*piped, *command(*each)], cwd=REPOSITORY, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
    assert target.is_dir()


def test_what_came_with_the_weights_is_kept(tmp_path):
    hf = tmp_path / "hf"
    write_random(hf, SMALL_CONFIG_V3)
    code = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (hf / "config.json").write_text(json.dumps(SMALL_CONFIG_V3 | code))
    (hf / "tokenizer.json").write_text('{"version": "1.0"}')
    (hf / "tokenizer_config.json").write_text("{}")
    (hf / "encoding").mkdir()
    (hf / "encoding" / "encoding_dsv32.py").write_text(
        'import os\nos.abort()\nTOOLS: str = """## Tools\nuse {schemas}"""\nBOS = EOS = "<s>"\nN = 3\n'
        'def f():\n    HIDDEN = "not at top level"\nLONE = "\\ud800｜"\n'
    )
    import_checkpoint(hf, tmp_path / "ours", new_indexer=True)
    kept = tmp_path / "ours" / "hf"
    assert (kept / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert json.loads((kept / "encoding.json").read_text()) == {
        "TOOLS": "## Tools\nuse {schemas}",
        "BOS": "<s>",
        "EOS": "<s>",
        "LONE": "\ud800｜",
    }
    config = json.loads((kept / "config.json").read_text())
    assert config["model_type"] == "deepseek_v32"
    assert config["index_topk"] == 2048
    (kept / "more").mkdir()
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (tmp_path / "back" / "encoding.json").exists()
    back = stored_arrays(next((tmp_path / "back").glob("*.safetensors")))
    assert np.isfinite(np.asarray(back["model.layers.0.self_attn.indexer.wk.weight_scale_inv"][1])).all()
