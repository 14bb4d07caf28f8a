"""``python -m dsjax.checkpoint.convert``: what it says of bad input, and what it leaves behind when it is killed."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from replica import SMALL_CONFIG, SMALL_CONFIG_V3, stored_arrays, write_random

from dsjax.checkpoint import array_files, convert, hf_export, hf_import, stacked, staging
from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint

REPOSITORY = Path(__file__).parents[3]
INDEX = "model.safetensors.index.json"
MATRIX = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture
def hf(tmp_path) -> Path:
    write_random(tmp_path / "hf", SMALL_CONFIG)
    return tmp_path / "hf"


def run(monkeypatch, *arguments) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    try:
        convert.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def file_of(hf: Path, name: str) -> Path:
    return hf / json.loads((hf / INDEX).read_text())["weight_map"][name]


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


def test_sources_that_hold_no_model_of_ours(hf, monkeypatch, capsys):
    target = hf.parent / "back"
    assert run(monkeypatch, "export", "--source", hf, "--target", target) == 1
    assert "holds no checkpoints" in capsys.readouterr().err
    (hf / "checkpoints").mkdir()
    assert run(monkeypatch, "export", "--source", hf, "--target", target) == 1
    assert "holds no finished checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "5 parsecs", "-1GB", "GB", "5PB", "0.2"])
def test_a_shard_size_that_is_none(monkeypatch, capsys, size):
    assert run(monkeypatch, "export", "--source", "x", "--target", "y", f"--shard-size={size}") == 2
    assert "is not a size: write 5GB, 500MB or 2GiB" in capsys.readouterr().err


# ---------------------------------------------------------------- full disks, interruptions


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those in which orbax keeps the time."""
    timed = ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


def test_a_full_disk_is_one_sentence_and_the_work_goes_on(hf, monkeypatch, capsys):
    target, writes = hf.parent / "ours", iter(range(10**9))
    inner = array_files.write_all

    def full(file, piece):
        if next(writes) >= 40:
            raise OSError(28, "No space left on device")
        inner(file, piece)

    with monkeypatch.context() as patched:
        patched.setattr(array_files, "write_all", full)
        patched.setattr(hf_export, "write_all", full)
        assert run(monkeypatch, "import", "--source", hf, "--target", target) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "the disk is full; make room and run the same command again" in error
        assert not target.exists()
    partial = hf.parent / "ours.partial"
    # Of the chunks that failed, the scales may be there; they are written again.
    done = {
        path.relative_to(partial): path.stat().st_mtime_ns
        for path in partial.rglob("c/**/*")
        if path.is_file() and path.suffix != ".partial" and "_scale_inv" not in str(path)
    }
    assert len(done) > 10
    assert run(monkeypatch, "import", "--source", hf, "--target", target) == 0
    assert {path: (target / path).stat().st_mtime_ns for path in done} == done
    undisturbed = hf.parent / "undisturbed"
    import_checkpoint(hf, undisturbed)
    assert content(target) == content(undisturbed)


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "dsjax.checkpoint.convert", *map(str, arguments)]


@pytest.mark.parametrize("kibibytes", [100, 8, 1])  # of a chunk, of orbax's metadata, of config.json
def test_a_limit_on_file_sizes_is_one_sentence(hf, kibibytes):
    """A real failure of a real write, by the kernel."""
    importing = command("import", "--source", hf, "--target", hf.parent / "ours")
    limited = ["bash", "-c", f'ulimit -f {kibibytes} && exec "$@"', "bash", *importing]
    result = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1
    assert "cannot be written: File too large" in result.stderr
    assert not (hf.parent / "ours").exists()
    subprocess.run(importing, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    import_checkpoint(hf, hf.parent / "undisturbed")
    assert content(hf.parent / "ours") == content(hf.parent / "undisturbed")


def test_a_reader_that_goes_away_ends_nothing(hf):
    target = hf.parent / "ours"
    piped = ["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "bash"]
    for each in (("import", "--source", hf, "--target", target), ("inspect", hf)):
        result = subprocess.run([*piped, *command(*each)], cwd=REPOSITORY, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
    assert target.is_dir()


def killed(
    command: list[str], folder: Path, pattern: str, count: int, signal_number: int
) -> subprocess.Popen:
    """Ends the process as soon as ``folder`` holds so many files."""

    def number_of_files() -> int:
        try:
            return sum(1 for _ in folder.rglob(pattern))
        except FileNotFoundError:  # a folder was renamed meanwhile
            return 0

    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and number_of_files() < count:
        time.sleep(0.0005)
    process.send_signal(signal_number)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_killed_imports_end_as_undisturbed_ones(hf, signal_number):
    generator = random.Random(signal_number)
    undisturbed, target, partial = hf.parent / "undisturbed", hf.parent / "ours", hf.parent / "ours.partial"
    import_checkpoint(hf, undisturbed, dtype="bfloat16")
    chunks = sum(path.parent != undisturbed for path in undisturbed.rglob("c/**/*"))
    importing = command("import", "--source", hf, "--target", target, "--dtype", "bfloat16")
    for _ in range(3):
        wanted = generator.randrange(chunks // 2)
        ended = killed(importing, partial, "c/**/*", wanted, signal_number)
        _, error = ended.communicate(timeout=60)
        if target.exists():  # too late
            break
        if signal_number == signal.SIGINT and ended.returncode == 130:
            assert "stopped: run the same command again to go on\n" in error
    if not target.exists():
        subprocess.run(importing, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    assert content(target) == content(undisturbed)
    assert not partial.exists()


@pytest.mark.slow
def test_killed_exports_end_as_undisturbed_ones(hf):
    generator = random.Random(0)
    source, undisturbed, target = (hf.parent / name for name in ("ours", "undisturbed", "back"))
    import_checkpoint(hf, source)
    export_checkpoint(source, undisturbed, shard_bytes=500_000)
    exporting = command("export", "--source", source, "--target", target, "--shard-size=500KB")
    partial = hf.parent / "back.partial"
    for _ in range(3):
        wanted = generator.randrange(1, 20)
        ended = killed(exporting, partial, "*.safetensors", wanted, signal.SIGKILL)
        ended.communicate(timeout=60)
    if not target.exists():
        subprocess.run(exporting, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    assert content(target) == content(undisturbed)
    assert not partial.exists()


def test_interrupted_work_is_not_mixed_with_other_work(hf, monkeypatch, capsys):
    target = hf.parent / "ours"
    with monkeypatch.context() as patched:
        patched.setattr(
            array_files, "write_all", lambda file, piece: (_ for _ in ()).throw(OSError(28, "full"))
        )
        assert run(monkeypatch, "import", "--source", hf, "--target", target, "--dtype", "bfloat16") == 1
    capsys.readouterr()
    assert run(monkeypatch, "import", "--source", hf, "--target", target, "--dtype", "fp8") == 1
    assert "was begun with dtype bfloat16, not fp8" in capsys.readouterr().err
    name = "lm_head.weight"
    stored_arrays(file_of(hf, name), "r+")[name][1][0, 0] += 1
    os.utime(file_of(hf, name))
    assert run(monkeypatch, "import", "--source", hf, "--target", target, "--dtype", "bfloat16") == 1
    assert f"the files of {hf} changed since {target}.partial was begun" in capsys.readouterr().err
    assert not target.exists()


def test_work_begun_by_another_version_is_not_completed(hf, monkeypatch, capsys):
    target = hf.parent / "ours"
    with monkeypatch.context() as patched:
        patched.setattr(stacked, "_GROUPED_CHUNK_BYTES", 50_000)
        patched.setattr(hf_import, "run_all", lambda jobs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(monkeypatch, "import", "--source", hf, "--target", target) == 130
    capsys.readouterr()
    assert run(monkeypatch, "import", "--source", hf, "--target", target) == 1
    assert (
        capsys.readouterr().err
        == f"this program changed since {target}.partial was begun: delete that folder\n"
    )


def test_two_at_the_same_target(hf, monkeypatch, capsys):
    partial = hf.parent / "ours.partial"
    partial.mkdir()
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(monkeypatch, "import", "--source", hf, "--target", hf.parent / "ours") == 1
    assert capsys.readouterr().err == f"{partial} is being written by another process: wait for its end\n"
    assert run(monkeypatch, "import", "--source", hf, "--target", hf.parent / "ours") == 0
    assert sorted(path.name for path in (hf.parent / "ours").iterdir()) == ["checkpoints", "hf"]


def test_a_scarce_disk_is_told_before(hf, monkeypatch, capsys):
    usage = shutil.disk_usage(hf)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    assert run(monkeypatch, "import", "--source", hf, "--target", hf.parent / "ours") == 0
    assert "15.0 MB are to be written and 1.0 MB are free" in capsys.readouterr().out


def test_an_interrupted_export_does_not_mix_two_models(hf, monkeypatch, capsys):
    source, other, target = (hf.parent / name for name in ("ours", "other", "back"))
    import_checkpoint(hf, source)
    inner, shards = hf_export._write_shard, iter(range(10**9))

    def full(*arguments):
        if next(shards) >= 2:
            raise hf_export.CheckpointError("full")
        inner(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "_write_shard", full)
        assert run(monkeypatch, "export", "--source", source, "--target", target, "--shard-size=1MB") == 1
    write_random(hf.parent / "hf2", SMALL_CONFIG, seed=1)
    source.rename(other)
    import_checkpoint(hf.parent / "hf2", source)
    capsys.readouterr()
    assert run(monkeypatch, "export", "--source", source, "--target", target, "--shard-size=1MB") == 1
    assert f"changed since {target}.partial was begun" in capsys.readouterr().err
    assert not target.exists()


# ---------------------------------------------------------------- what comes with the weights


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
