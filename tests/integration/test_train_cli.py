"""``python train.py`` as a user runs it: real processes, killed and stopped, and what they leave behind."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "model.vocab_size": 512,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.q_lora_rank": 16,
    "model.kv_lora_rank": 16,
    "model.intermediate_size": 64,
    "model.moe_intermediate_size": 16,
    "model.index_topk": 16,
    "train.steps": 60,
    "train.batch_size": 4,
    "train.sequence_length": 64,
    "optimizer.warmup_steps": 5,
    "optimizer.cosine_start_step": 0,
    "optimizer.cosine_end_step": 0,
    "eval.every_steps": 20,
    "eval.batches": 2,
    "eval.sample_tokens": 8,
    "checkpoint.every_steps": 10,
    "log.every_steps": 1,
    "log.tensorboard": "false",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A few dozen source files of this repository."""
    folder = tmp_path_factory.mktemp("text")
    for number, path in enumerate(sorted((REPOSITORY / "dsjax").rglob("*.py"))):
        (folder / f"{number}.py").write_text(path.read_text())
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Compiled programs, shared so that only the first run of the module compiles."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def command(text, cache):
    """The command line of a run in a folder, with overrides."""

    def build(workdir: Path, **overrides) -> list[str]:
        values = SMALL | {"data.paths": text, "log.compilation_cache": cache}
        values |= {name.replace("__", "."): value for name, value in overrides.items()}
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        return [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *flags]

    return build


def start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(command: list[str], status: int = 0) -> str:
    process = start(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    metrics = workdir / "metrics.jsonl"
    for _ in range(3000):
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if any(f'"step": {step},' in line for line in lines):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in a minute")


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the finished checkpoints: orbax writes under another name and renames at the end."""
    folder = workdir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
    )


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    output = finish(command(workdir))
    assert "sample" in output
    return workdir


def test_a_run_leaves_everything_behind(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert first["step"] == 0
    assert first["eval/bits_per_byte"] > last["eval/bits_per_byte"]
    assert first["eval/loss"] == pytest.approx(math.log(512), rel=0.02)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 61))
    assert saved_steps(undisturbed) == [50, 60]
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (undisturbed / "sample.txt").read_text().startswith("def ")
    timing = [json.loads(line) for line in (undisturbed / "timing.jsonl").read_text().splitlines()]
    assert timing[0]["timing/compile_seconds"] > 0
    assert timing[-1]["timing/tokens_per_second"] > 0


@pytest.fixture(scope="module")
def mixture(text, tmp_path_factory) -> dict[str, object]:
    """Two prepared sets, packed whole and isolated, with moved middles."""
    folder = tmp_path_factory.mktemp("sets")
    program = [sys.executable, "-m", "dsjax.data.prepare", f"--input={text}"]
    finish([*program, f"--output={folder}/a", "--train-tokenizer", "--vocab-size=512"])
    finish([*program, f"--output={folder}/b", f"--tokenizer={folder}/a/tokenizer.json", "--seed=1"])
    sets = {"data.sets": f"{folder}/a=3,{folder}/b=1", "data.paths": "", "data.packing": "whole"}
    return sets | {"data.isolate_documents": "true", "data.fim_rate": 0.5}


def test_killed_at_a_random_step_it_goes_on_bit_for_bit(command, mixture, tmp_path):
    undisturbed, tmp_path = tmp_path / "undisturbed", tmp_path / "killed"
    finish(command(undisturbed, **mixture))
    process = start(command(tmp_path, **mixture))
    wait_for_step(tmp_path, random.Random(1).randint(11, 55), process)
    while not saved_steps(tmp_path):  # the first is written in the background, from step 10 on
        assert process.poll() is None, "the run ended without a checkpoint"
        time.sleep(0.02)
    process.kill()
    process.communicate()
    output = finish(command(tmp_path, **mixture))
    assert "resumed from the checkpoint of step" in output
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert (tmp_path / "sample.txt").read_bytes() == (undisturbed / "sample.txt").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(command, undisturbed, tmp_path, number):
    process = start(command(tmp_path))
    wait_for_step(tmp_path, 23, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run the same command again to go on" in output
    assert 23 <= saved_steps(tmp_path)[-1] < 60
    finish(command(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_second_process_is_refused_and_a_second_signal_ends_the_first_at_once(command, tmp_path):
    process = start(command(tmp_path, train__steps=100_000))
    wait_for_step(tmp_path, 23, process)
    assert "is in use by another train.py" in finish(command(tmp_path, train__steps=100_000), status=2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    # On a busy machine both are handled together, in either order.
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT), output
    assert "stopped at once" in output
    assert "Traceback" not in output
    assert saved_steps(tmp_path)


def test_a_run_that_diverges_stops_with_a_diagnosis_and_keeps_its_last_good_checkpoint(command, tmp_path):
    output = finish(
        command(tmp_path, optimizer__last_start_step=24, optimizer__lr_last=1e38, train__max_bad_steps=4),
        status=1,
    )
    assert "4 steps in a row were not finite" in output
    assert "the checkpoint of step 20 is from before them and untouched" in output
    assert "Traceback" not in output
    assert saved_steps(tmp_path)[-1] == 20


def test_eval_reads_what_train_wrote(command, undisturbed):
    output = finish([word if word != "train.py" else "eval.py" for word in command(undisturbed)])
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    figures = json.loads((undisturbed / "eval.json").read_text())
    assert figures["eval/bits_per_byte"] == json.loads(lines[-1])["eval/bits_per_byte"]
    assert "held-out tokens" in output


def test_another_model_in_the_same_workdir_is_refused(command, undisturbed):
    output = finish(command(undisturbed, model__hidden_size=64), status=2)
    assert "model.hidden_size=64 differs from the 32" in output
    assert "Traceback" not in output


def test_the_second_start_takes_its_programs_from_the_cache(text, tmp_path):
    """With the model of the tiny config as it is: what takes time at a start is compiling it."""

    def seconds_to_first_step(name: str) -> float:
        flags = {"data.paths": text, "log.compilation_cache": tmp_path / "xla", "log.tensorboard": "false"}
        flags |= {"train.steps": 1, "optimizer.warmup_steps": 0, "eval.batches": 1, "eval.sample_tokens": 0}
        flags |= {"optimizer.cosine_start_step": 0, "optimizer.cosine_end_step": 0}
        overrides = [f"--config.{key}={value}" for key, value in flags.items()]
        workdir = tmp_path / name
        finish([sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *overrides])
        timing = json.loads((workdir / "timing.jsonl").read_text().splitlines()[0])
        return timing["timing/first_step_after_seconds"]

    first, second = seconds_to_first_step("first"), seconds_to_first_step("second")
    assert first < 60
    assert second < first / 2


# ---------------------------------------------------------------- weights leave and come back


def convert(*arguments) -> str:
    return finish([sys.executable, "-m", "dsjax.checkpoint.convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def exported(undisturbed, tmp_path_factory) -> Path:
    """The trained model of the undisturbed run as a Hugging Face directory."""
    target = tmp_path_factory.mktemp("exported") / "hf"
    convert("export", "--source", undisturbed, "--target", target)
    return target


def held_out_losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


@pytest.mark.parametrize("way", ["hf", "imported", "workdir"])
def test_a_run_begins_where_another_ended(command, undisturbed, exported, tmp_path, way):
    assert "nothing missing" in convert("inspect", exported)
    init = {"init__hf": exported} if way == "hf" else {"init__checkpoint": undisturbed}
    if way == "hf":
        shutil.copytree(exported, tmp_path / "source")
        init = {"init__hf": tmp_path / "source"}
    if way == "imported":
        convert("import", "--source", exported, "--target", tmp_path / "ours")
        init = {"init__checkpoint": tmp_path / "ours"}
    output = finish(command(tmp_path / "run", train__steps=3, **init))
    assert "weights from" in output
    assert held_out_losses(tmp_path / "run")[0] == held_out_losses(undisturbed)[60]
    text = (undisturbed / "data" / "tokenizer.json").read_text()
    assert (tmp_path / "run" / "data" / "tokenizer.json").read_text() == text
    if way != "hf":
        return
    # It goes on from its own checkpoint wherever that lies, without the source, and its weights leave again.
    shutil.rmtree(tmp_path / "source")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert "resumed from the checkpoint of step 3" in finish(command(moved, train__steps=4, **init))
    assert "resumed from the checkpoint of step 4" in finish(command(moved, train__steps=5))
    evaluation = [word if word != "train.py" else "eval.py" for word in command(moved, train__steps=5)]
    assert "held-out tokens" in finish(evaluation)
    convert("export", "--source", moved, "--target", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == text
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((exported / "config.json").read_text())


def test_weights_of_another_model_are_refused(command, exported, tmp_path):
    changed = {"init__hf": exported, "model__moe_intermediate_size": 32}
    output = finish(command(tmp_path / "run", **changed), status=2)
    assert f"model.moe_intermediate_size=32 differs from the 16 of {exported}" in output
    assert output.count("Traceback") == 0
    output = finish(command(tmp_path / "other", init__hf=tmp_path / "nowhere"), status=2)
    assert f"init.hf: {tmp_path / 'nowhere'} is not a directory" in output
    assert not (tmp_path / "other" / "data").exists()  # it was refused before the text was prepared
