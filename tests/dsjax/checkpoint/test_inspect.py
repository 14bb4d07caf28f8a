"""``convert inspect`` as users run it, on the headers of whole releases and on damaged ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from replica import write_replica

_MEASURED = """
import sys
from dsjax.checkpoint.convert import main
sys.argv = ["convert", "inspect", sys.argv[1]]
try:
    main()
finally:
    # Not getrusage: that counts what the process held before it became this program.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", int(peak.split()[1]) * 1024)
"""


def inspect(directory: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _MEASURED, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def edit_header(directory: Path, name: str, change) -> Path:
    """Rewrites the header of the file that holds tensor ``name``; its length stays, padded with blanks."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    path = directory / weight_map[name]
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        change(header[name])
        text = json.dumps(header).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("v32")
    write_replica(directory)
    return directory


def test_the_whole_of_v32_is_sound(released):
    result = inspect(released)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr
    assert "163 files" in result.stdout
    assert "92,425" in result.stdout
    assert "685,396,921,376" in result.stdout
    assert "689,471,107,200" in result.stdout
    assert "nothing missing, unexpected, mis-shaped or mis-typed" in result.stdout
    assert int(result.stdout.split("peak ")[1]) < 2**30


def test_the_whole_of_v3_is_sound(tmp_path):
    write_replica(tmp_path, v3=True)
    result = inspect(tmp_path)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr
    assert "91,991" in result.stdout
    assert "lightning indexer" not in result.stdout


def test_every_problem_is_named(tmp_path):
    write_replica(tmp_path)
    typed = edit_header(tmp_path, "model.norm.weight", lambda entry: entry.update(dtype="I32"))
    shaped = edit_header(
        tmp_path, "model.layers.5.self_attn.q_a_proj.weight", lambda e: e.update(shape=[7168, 1536])
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 264}))
    result = inspect(tmp_path)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert f"{typed}: tensor model.norm.weight is I32, expected BF16 or F32" in lines
    assert (
        f"{shaped}: tensor model.layers.5.self_attn.q_a_proj.weight has shape (7168, 1536), "
        "expected (1536, 7168)" in lines
    )
    assert f"{tmp_path} lacks tensor model.layers.61.mlp.experts.263.down_proj.weight_scale_inv" in lines
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 62}))
    lines = inspect(tmp_path).stdout.splitlines()
    assert any("model.layers.61.embed_tokens.weight is not part of the model" in line for line in lines)
    assert any("promises multi-token prediction and no file holds any" in line for line in lines)


def test_a_matrix_in_fp8_without_quantization_config_is_mistyped(released, tmp_path):
    for path in released.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    config = json.loads((released / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = inspect(tmp_path)
    assert result.returncode == 1
    assert "q_a_proj.weight is F8_E4M3, expected BF16 or F32" in result.stdout
    assert "q_a_proj.weight_scale_inv is not part of the model" in result.stdout


@pytest.mark.parametrize("missing", ["config.json", "model-00007-of-000163.safetensors"])
def test_a_missing_file_is_one_sentence(tmp_path, missing):
    write_replica(tmp_path)
    (tmp_path / missing).unlink()
    result = inspect(tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / missing) in result.stderr


def test_a_directory_that_is_none(tmp_path):
    result = inspect(tmp_path / "nowhere")
    assert (result.returncode, result.stderr) == (
        1,
        f"{tmp_path / 'nowhere'} is not a directory: name the one that holds config.json\n",
    )
