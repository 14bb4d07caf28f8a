"""One run in several processes on localhost: losses, a signal, a kill, and checkpoints that move between meshes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from on_devices import environment

from dsjax.observe.metrics import read

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
STEPS, STEPS_ALONE = 8, 16
SILENCE_SECONDS = 10


class Processes(NamedTuple):
    """Those of one run, and where what they say goes."""

    running: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, timeout: float = 600) -> list[int]:
        """Their exit statuses."""
        return [process.wait(timeout) for process in self.running]

    def said(self, index: int) -> str:
        return self.logs[index].read_text(errors="replace")

    def wait_for(self, words: str, index: int = 0, timeout: float = 600) -> None:
        end = time.monotonic() + timeout
        while words not in self.said(index):
            assert time.monotonic() < end, self.said(index)[-2000:]
            assert self.running[index].poll() is None, self.said(index)[-2000:]
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the tiny run in so many processes of so many devices; the first prepares the text for all."""
    shared = tmp_path_factory.mktemp("shared")
    everyone: list[subprocess.Popen] = []

    def begin(
        workdir: Path,
        processes: int = 1,
        devices: int = 1,
        only: int | None = None,
        of_first: str | None = None,
        program: str = "train.py",
        **changes,
    ) -> Processes:
        values = {
            "train.steps": STEPS,
            "eval.every_steps": STEPS,
            "eval.batches": 1,
            "eval.sample_tokens": 0,
            "checkpoint.every_steps": 3,
            "log.every_steps": 1,
            "log.tensorboard": "false",
            "log.compilation_cache": shared / "xla",
            "hosts.silence_timeout_seconds": SILENCE_SECONDS,
        } | {name.replace("__", "."): value for name, value in changes.items()}
        if workdir != begin.alone:
            values["data.sets"] = begin.alone / "data"
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        command = [sys.executable, program, "--config=configs/tiny.py", f"--workdir={workdir}", *flags]
        address = f"localhost:{free_port()}"
        started = Processes([], [])
        for index in range(processes) if only is None else [only]:
            several = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            log = workdir.parent / f"{workdir.name}-{len(everyone)}.log"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [*command, of_first] if of_first and not index else command,
                    cwd=REPOSITORY,
                    env=environment(devices) | {"PYTHONUNBUFFERED": "1"} | (several if processes > 1 else {}),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            everyone.append(process)
            started.running.append(process)
            started.logs.append(log)
        return started

    begin.alone, begin.on_two_devices = shared / "alone", shared / "two"
    alone = begin(begin.alone, train__steps=STEPS_ALONE)
    assert alone.wait() == [0], alone.said(0)[-2000:]
    two = begin(begin.on_two_devices, devices=2, eval__sample_tokens=4)
    assert two.wait() == [0], two.said(0)[-2000:]
    yield begin
    for process in everyone:
        if process.poll() is None:
            process.kill()


def losses(workdir: Path) -> list[float]:
    return [line["train/loss"] for line in read(workdir / "metrics.jsonl") if "train/loss" in line]


def assert_one_speaks(run: Processes) -> None:
    """Each says who it is, and the first alone what the run does."""
    count = len(run.running)
    for index in range(count):
        assert f"process {index} of {count}: 1 of {count} devices, cpu" in run.said(index)
    assert [index for index in range(count) if "held-out loss" in run.said(index)] == [0]


def assert_as_alone(start, workdir: Path, steps: int) -> None:
    """But for the order of sums, losses are those of one process with one device."""
    found = losses(workdir)
    assert len(found) == steps
    assert found == pytest.approx(losses(start.alone)[:steps], rel=2e-5)


def test_losses_are_those_of_one_process(start, tmp_path):
    """Two processes add up in the order of two devices: they are the same to the last bit."""
    two = start(tmp_path / "two", 2, eval__sample_tokens=4)
    assert two.wait() == [0, 0], two.said(0)[-2000:]
    assert_one_speaks(two)
    assert_as_alone(start, tmp_path / "two", STEPS)
    for name in ("metrics.jsonl", "sample.txt"):
        assert (tmp_path / "two" / name).read_bytes() == (start.on_two_devices / name).read_bytes()
    evaluated = start(tmp_path / "two", 2, program="eval.py")
    assert evaluated.wait() == [0, 0], evaluated.said(0)[-2000:]
    figures = json.loads((tmp_path / "two" / "eval.json").read_text())
    trained = [line["eval/loss"] for line in read(tmp_path / "two" / "metrics.jsonl") if "eval/loss" in line]
    assert figures["eval/loss"] == trained[-1]


def test_a_checkpoint_of_four_processes_goes_on_anywhere(start, tmp_path):
    """SIGTERM to one: all save after the same step and end well. Then on 1, 2 and 8 devices, and in two processes."""
    four = start(tmp_path / "four", 4, train__steps=10_000)
    four.wait_for("step 3/", 0)
    four.running[2].send_signal(signal.SIGTERM)
    assert four.wait() == [0] * 4, four.said(0)[-2000:]
    assert_one_speaks(four)
    saved = int(re.search(r"SIGTERM: saved at step (\d+)", four.said(0)).group(1))
    assert_as_alone(start, tmp_path / "four", saved)
    whole = start(tmp_path / "whole", devices=4, train__steps=saved + 3)
    assert whole.wait() == [0], whole.said(0)[-2000:]
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "four") == pytest.approx(expected[:saved], rel=1e-6)  # in another order of sums
    for processes, devices in ((1, 1), (1, 2), (1, 8), (2, 2)):
        workdir = tmp_path / f"on-{processes}-{devices}"
        shutil.copytree(tmp_path / "four", workdir)
        again = start(workdir, processes, devices, train__steps=saved + 3)
        assert again.wait() == [0] * processes, again.said(0)[-2000:]
        assert f"resumed from the checkpoint of step {saved}" in again.said(0)
        assert losses(workdir) == pytest.approx(expected, rel=1e-5)


def test_one_is_killed_and_the_others_end_and_the_command_goes_on(start, tmp_path):
    for victim in (1, 0):
        workdir = tmp_path / f"without-{victim}"
        both = start(workdir, 2, train__steps=10_000)
        both.wait_for("step 5/", 0)
        both.running[victim].kill()
        end = time.monotonic()
        other = 1 - victim
        assert both.running[other].wait(SILENCE_SECONDS + 30) != 0
        assert time.monotonic() - end < SILENCE_SECONDS + 20
        said = both.said(other)
        lost = f"process {other} of 2 lost another one" in said
        assert lost or "another task died; see the other task logs" in said, said[-2000:]
        again = start(workdir, 2)
        assert again.wait() == [0, 0], again.said(0)[-2000:]
        assert "resumed from the checkpoint of step 3" in again.said(0) or "step 6" in again.said(0)
        expected = (start.on_two_devices / "metrics.jsonl").read_bytes()
        assert (workdir / "metrics.jsonl").read_bytes() == expected


def test_other_flags_or_another_folder_are_refused(start, tmp_path):
    """Both folders have been that of a run."""
    for name in ("run", "elsewhere"):
        shutil.copytree(start.on_two_devices, tmp_path / name)
    for of_first, words in (
        ("--config.optimizer.lr=0.1", "optimizer.lr=0.004 in process 1 and 0.1 in process 0: start all with"),
        (
            f"--workdir={tmp_path / 'elsewhere'}",
            f"--workdir={tmp_path / 'run'} is not the folder of process 0",
        ),
    ):
        both = start(tmp_path / "run", 2, of_first=of_first)
        first, second = both.wait(SILENCE_SECONDS + 120)
        assert (first != 0, second) == (True, 2), both.said(0)[-2000:]
        assert words in both.said(1)
        assert "lost another one" in both.said(0) or "another task died" in both.said(0), both.said(0)[-2000:]


def refusal(variables: dict[str, str], workdir: Path) -> str:
    """The sentence with which a process of these variables ends."""
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2, run.stderr[-2000:]
    assert len(run.stderr.strip().splitlines()) == 1
    return run.stderr


def test_a_taken_port_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        said = refusal(variables, tmp_path / "run")
    assert f"JAX_COORDINATOR_ADDRESS={address}: process 0 cannot listen on this port (" in said


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_host_is_named(start, tmp_path, missing):
    waiting = start(tmp_path / "run", 2, only=1 - missing, hosts__start_timeout_seconds=6)
    began = time.monotonic()
    assert waiting.wait(120) == [1]
    assert time.monotonic() - began < 110  # most of it is starting Python, beside other tests
    said = waiting.said(0)
    assert f"process {1 - missing} of 2 waits for" in said
    assert re.search(r"waited 6 s for .*localhost:\d+.*, in vain: .*nc -vz localhost \d+", said), said[-2000:]


def test_half_of_the_variables_are_refused(tmp_path):
    for variables, words in (
        (
            {"JAX_NUM_PROCESSES": "2"},
            "set: JAX_NUM_PROCESSES; not set: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID: a run of several",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
            "JAX_PROCESS_ID=2 must be less than JAX_NUM_PROCESSES=2",
        ),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=two in the environment"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1"},
            "set: JAX_COORDINATOR_ADDRESS; not set: JAX_NUM_PROCESSES, JAX_PROCESS_ID",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "JAX_COORDINATOR_ADDRESS=localhost is not HOST:PORT"),
    ):
        assert words in refusal(variables, tmp_path / "run")
