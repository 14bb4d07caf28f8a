"""Signals that end a run, in a process of their own."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from dsjax.train.stop import StopSignal
first, *others = {signals}

def send_after_first_line(frame, event, _):
    # While the first is being handled the others come.
    if event == "line" and others and frame.f_lineno > frame.f_code.co_firstlineno + 1:
        os.kill(os.getpid(), others.pop())
    return send_after_first_line if frame.f_code.co_name == "_note" else None

with StopSignal() as stop:
    sys.settrace(send_after_first_line)
    os.kill(os.getpid(), first)
    sys.settrace(None)
    print("received", int(stop.received), flush=True)
"""


def run(*signals: int) -> subprocess.CompletedProcess:
    program = PROGRAM.format(signals=[int(number) for number in signals])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_is_noted(number):
    ended = run(number)
    assert (ended.returncode, ended.stdout) == (0, f"received {int(number)}\n")
    assert f"{number.name}: stopping after this step" in ended.stderr


def test_a_second_signal_ends_the_process_even_while_the_first_is_handled():
    ended = run(signal.SIGINT, signal.SIGTERM)
    assert ended.returncode == 128 + signal.SIGTERM, ended
    assert "stopped at once" in ended.stderr
