"""``python -m dsjax.checkpoint.convert`` on full disks, killed, interrupted, and beside itself."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from convert_program import REPOSITORY, command, content, file_of, run
from replica import SMALL_CONFIG, stored_arrays, write_random

from dsjax.checkpoint import array_files, hf_export, hf_import, stacked, staging
from dsjax.checkpoint.hf_export import export_checkpoint
from dsjax.checkpoint.hf_import import import_checkpoint


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
