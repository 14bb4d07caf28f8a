"""JSON lines: exact, whole after a kill, and without duplicates after a resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.observe.metrics import MetricsWriter, read

_REPOSITORY = Path(__file__).parents[3]


def write_steps(folder, steps, *, resume_step=None):
    with MetricsWriter(folder, tensorboard=False, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / (step + 3)})
            writer.write_timing(step, {"tokens_per_second": step * 0.1})


def test_floats_come_back_as_they_were(tmp_path):
    values = {"third": 1 / 3, "tiny": 5e-324, "float32": np.float32(0.1), "jax": jnp.float32(0.2), "count": 7}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(4, values)
    (line,) = read(tmp_path / "metrics.jsonl")
    assert line == {"step": 4} | {name: float(value) for name, value in values.items()}
    assert isinstance(line["count"], int)
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 4, "third": 0.3333333333333333, ')


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": float("nan"), "b": float("inf"), "c": jnp.float32("-inf")})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    (line,) = read(tmp_path / "metrics.jsonl")
    assert np.isnan(line["a"])
    assert (line["b"], line["c"]) == (np.inf, -np.inf)


def test_only_scalars(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises((ValueError, TypeError)):
        writer.write(1, {"a": np.zeros(2)})
    assert read(tmp_path / "metrics.jsonl") == []


def test_a_killed_and_resumed_run_writes_the_same_bytes(tmp_path):
    write_steps(tmp_path / "whole", range(1, 21))
    write_steps(tmp_path / "killed", range(1, 16))
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 16, "train/lo')
    assert [line["step"] for line in read(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 16))
    write_steps(tmp_path / "killed", range(11, 21), resume_step=10)
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert not (tmp_path / "killed" / f"{name}.new").exists()


@pytest.mark.parametrize("torn", [b'{"step": 5', b"{}\n", b"\x00\x00\x00\n", b"[1]\n", b"\xff\n", b""])
def test_whatever_a_crash_left_behind_is_removed(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    write_steps(tmp_path, [], resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_run_from_the_start_keeps_no_older_lines(tmp_path):
    write_steps(tmp_path, [0, 1, 2])
    write_steps(tmp_path, [0])
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0]
    write_steps(tmp_path, [], resume_step=0)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0]


def test_lines_are_there_when_the_process_is_killed(tmp_path):
    program = (
        "import os, sys\nfrom dsjax.observe.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], tensorboard=True)\n"
        "writer.write(1, {'a': 1.0}); writer.write_timing(1, {'b': 2.0})\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    environment = os.environ | {"PYTHONPATH": str(_REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
    assert read(tmp_path / "timing.jsonl") == [{"step": 1, "b": 2.0}]


def test_tensorboard_gets_the_same_scalars_and_the_place_to_purge_from(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, tensorboard=True, resume_step=7) as writer:
        writer.write(8, {"train/loss": 0.5})
        writer.write_timing(8, {"mfu": 0.25})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # records of 8 bytes length, 4 checksum, the event, 4 checksum
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    scalars = {
        value.tag: (event.step, value.simple_value) for event in events for value in event.summary.value
    }
    assert scalars == {"train/loss": (8, 0.5), "mfu": (8, 0.25)}
    assert [event.step for event in events if event.HasField("session_log")] == [8]
