"""``python -m dsjax.checkpoint.convert`` of checkpoints that are damaged, hostile, or none: one sentence, no target."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from convert_program import INDEX, MATRIX, file_of, run
from replica import SMALL_CONFIG, stored_arrays

from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint


def edit_header(hf: Path, name: str, **changes) -> Path:
    """Rewrites one entry; the header keeps its length, padded with blanks."""
    path = file_of(hf, name)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[name] |= changes
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
    return path


def map_to(hf: Path, name: str, file: str) -> None:
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"][name] = file
    (hf / INDEX).write_text(json.dumps(index))


def truncated(hf):
    path = file_of(hf, MATRIX)
    os.truncate(path, path.stat().st_size - 1)
    return path, "tensor"


def long_header(hf):
    path = file_of(hf, MATRIX)
    with path.open("r+b") as file:
        file.write((path.stat().st_size).to_bytes(8, "little"))
    return path, "header"


def overlapping(hf):
    entry = stored_arrays(file_of(hf, MATRIX))[MATRIX][1]
    return edit_header(hf, MATRIX, data_offsets=[0, entry.nbytes]), "tensor"


def out_of_range(hf):
    return edit_header(hf, MATRIX, data_offsets=[10**12, 10**12 + 80 * 320]), f"tensor {MATRIX}"


def missing_shard(hf):
    path = file_of(hf, MATRIX)
    path.unlink()
    return path, "missing"


def parent_in_the_index(hf):
    map_to(hf, MATRIX, "../hf/secret.safetensors")
    return hf / INDEX, "'../hf/secret.safetensors'"


def absolute_in_the_index(hf):
    map_to(hf, MATRIX, "/etc/passwd")
    return hf / INDEX, "'/etc/passwd'"


def link_out(hf):
    path = file_of(hf, MATRIX)
    path.rename(hf.parent / "elsewhere.safetensors")
    path.symlink_to(hf.parent / "elsewhere.safetensors")
    return path, "link"


def wrong_shape(hf):
    return edit_header(
        hf, MATRIX, shape=[320, 80]
    ), f"tensor {MATRIX} has shape (320, 80), expected (80, 320)"


def wrong_dtype(hf):
    return edit_header(hf, MATRIX, dtype="I8"), f"tensor {MATRIX} is I8, expected F8_E4M3"


def scale(value: float):
    def change(hf):
        name = f"{MATRIX}_scale_inv"
        path = file_of(hf, name)
        stored_arrays(path, "r+")[name][1][0, -1] = value
        return path, f"tensor {name} holds the scale {value}"

    return change


def missing_scale(hf):
    name = f"{MATRIX}_scale_inv"
    path = file_of(hf, name)
    index = json.loads((hf / INDEX).read_text())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header, data = json.loads(file.read(length)), file.read()
    start, stop = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [offset - (stop - start) for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[:start] + data[stop:])
    del index["weight_map"][name]
    (hf / INDEX).write_text(json.dumps(index))
    return hf, f"lacks tensor {name}"


def different_copy(hf):
    name = f"model.layers.{SMALL_CONFIG['num_hidden_layers']}.shared_head.head.weight"
    path = file_of(hf, name)
    stored_arrays(path, "r+")[name][1][-1, -1] += 1
    return path, f"tensor {name} differs from lm_head.weight"


def config_without_a_field(hf):
    config = json.loads((hf / "config.json").read_text())
    del config["kv_lora_rank"]
    (hf / "config.json").write_text(json.dumps(config))
    return hf / "config.json", "kv_lora_rank is missing"


def encoding_of(program: bytes, what: str):
    def change(hf):
        (hf / "encoding").mkdir()
        (hf / "encoding" / "encoding.py").write_bytes(program)
        return hf / "encoding" / "encoding.py", f"cannot be parsed ({what}"

    return change


def countless_experts(hf):
    config = json.loads((hf / "config.json").read_text()) | {"n_routed_experts": 10**12}
    (hf / "config.json").write_text(json.dumps(config))
    return hf / "config.json", "n_routed_experts=1000000000000 make more than 1,000,000 experts"


def dangling(name: str, what: str):
    def change(hf):
        (hf / name).unlink(missing_ok=True)
        (hf / name).symlink_to("nowhere")
        return hf / name, what

    return change


def unspeakable_name(hf):
    path = file_of(hf, MATRIX)
    content = path.read_bytes().replace(b"kv_a_layernorm", b"kv\\u001b[31mrm", 1)  # an escape code, in JSON
    path.write_bytes(content)
    return path, r"kv\x1b[31mrm.weight' is no name of a tensor"


BAD = [
    *(truncated, long_header, overlapping, out_of_range, missing_shard, parent_in_the_index),
    *(absolute_in_the_index, link_out, wrong_shape, wrong_dtype, missing_scale, different_copy),
    *(config_without_a_field, countless_experts, unspeakable_name),
    pytest.param(encoding_of(b"def (:", "invalid syntax"), id="no Python"),
    pytest.param(encoding_of(b"(" * 300, "too many nested"), id="nested Python"),
    pytest.param(encoding_of(b'A = "\xff"', "(unicode error)"), id="no text"),
    pytest.param(dangling("tokenizer.json", "cannot be read"), id="dangling tokenizer"),
    pytest.param(dangling(INDEX, "cannot be read"), id="dangling index"),
    *(pytest.param(scale(value), id=f"scale {value}") for value in (float("nan"), 0.0, float("inf"), -1.0)),
]


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
@pytest.mark.parametrize("spoil", BAD)
def test_bad_input_is_one_sentence_and_no_target(hf, monkeypatch, capsys, spoil, dtype):
    path, what = spoil(hf)
    target = hf.parent / "ours"
    assert run(monkeypatch, "import", "--source", hf, "--target", target, "--dtype", dtype) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert what in error
    assert not target.exists()


def damaged_metadata(text: str):
    def change(ours):
        (ours / "checkpoints" / "0" / "state" / "_METADATA").write_text(text)

    return change


def damaged_array(text: str):
    def change(ours):
        (ours / "checkpoints" / "0" / "state" / "model.norm.weight" / "zarr.json").write_text(text)

    return change


def run_of_countless_experts(ours):
    model = {"n_routed_experts": 10**12}
    (ours / "config.json").write_text(json.dumps({"model": model | {"rope_scaling": {}}}))


def deeply_nested_run(ours):
    (ours / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "spoil",
    [
        *(damaged_metadata(text) for text in ("", "[]", "{}", '{"tree_metadata": []}', "[" * 100_000)),
        *(damaged_array(text) for text in ("", "[]", "{}", '{"codecs": [], "chunk_grid": 1}', "[" * 100_000)),
        *(run_of_countless_experts, deeply_nested_run),
    ],
)
def test_a_damaged_model_of_ours_is_one_sentence(hf, monkeypatch, capsys, spoil):
    import_checkpoint(hf, hf.parent / "ours")
    spoil(hf.parent / "ours")
    capsys.readouterr()
    assert run(monkeypatch, "export", "--source", hf.parent / "ours", "--target", hf.parent / "back") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(hf.parent / "ours") in error
    assert not (hf.parent / "back").exists()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("command", ["import", "export"])
def test_numbers_that_fp8_cannot_say_are_refused(hf, monkeypatch, capsys, command, value):
    import_checkpoint(hf, hf.parent / "ours", dtype="float32")
    export_checkpoint(hf.parent / "ours", hf.parent / "full")
    path = file_of(hf.parent / "full", MATRIX)
    stored_arrays(path, "r+")[MATRIX][1][3, 5] = value
    source, target = hf.parent / "full", hf.parent / "fp8"
    if command == "export":
        import_checkpoint(source, hf.parent / "spoilt")
        source = path = hf.parent / "spoilt"
    capsys.readouterr()
    assert run(monkeypatch, command, "--source", source, "--target", target, "--dtype", "fp8") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert f"tensor {MATRIX} holds a number that is not finite" in error
    assert not target.exists()


def test_a_source_whose_name_no_folder_can_have(monkeypatch, capsys):
    for name in ("x" * 300, "a\0b"):
        assert run(monkeypatch, "import", "--source", name, "--target", "y") == 1
        assert "is not a directory" in capsys.readouterr().err
        assert run(monkeypatch, "export", "--source", name, "--target", "y") == 1
        assert "holds no checkpoints" in capsys.readouterr().err


def test_sources_that_hold_no_model_of_ours(hf, monkeypatch, capsys):
    target = hf.parent / "back"
    assert run(monkeypatch, "export", "--source", hf, "--target", target) == 1
    assert "holds no checkpoints" in capsys.readouterr().err
    (hf / "checkpoints").mkdir()
    assert run(monkeypatch, "export", "--source", hf, "--target", target) == 1
    assert "holds no finished checkpoint" in capsys.readouterr().err
