"""Lines without a terminal, a bar on one, and a terminal that is left as it was found."""

import io
import os
import pty
import sys
import threading
from contextlib import nullcontext

import pytest

from dsjax.observe.progress import Progress


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_lines(total, updates, *, seconds_a_step=1.0, **options):
    file, clock = io.StringIO(), Clock()
    with Progress(total, file=file, clock=clock, **options) as progress:
        for step in updates:
            clock.now = step * seconds_a_step
            progress.update(step, loss=3.2141, tokens_per_second=12345.4)
    return file.getvalue().splitlines()


def test_lines_without_a_terminal():
    assert run_lines(600, [100, 120], seconds_a_step=0.5, every_steps=20) == [
        "step 100/600  loss 3.214  12,345 tokens/s",
        "step 120/600  loss 3.214  12,345 tokens/s  4:00 left",
    ]


def test_at_most_one_line_an_interval_and_one_at_the_end():
    lines = run_lines(25, range(1, 26), every_steps=10)
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    lines = run_lines(25, range(13, 26), every_steps=10, first_step=12)
    assert [line.split()[1] for line in lines] == ["22/25", "25/25"]
    assert lines[-1].endswith("tokens/s")


@pytest.mark.parametrize(
    ("seconds_a_step", "left"),
    [(1, "0:08 left"), (10, "1:20 left"), (1000, "2:13:20 left"), (20000, "1 d 20:26 left")],
)
def test_the_time_left(seconds_a_step, left):
    assert run_lines(10, [1, 2], seconds_a_step=seconds_a_step)[-1].endswith(left)


def test_other_activities_are_named_once_and_messages_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    message = "[bold]x[/bold] " + "word " * 30 + "end"
    with Progress(10, file=file) as progress:
        for _ in range(2):
            with progress.doing("evaluating"):
                pass
        progress.say(message)
    assert file.getvalue() == f"evaluating ...\n{message}\n"


def test_only_the_one_that_speaks():
    file = io.StringIO()
    with Progress(2, file=file, speaks=False) as progress, progress.doing("compiling"):
        progress.update(2, loss=1, tokens_per_second=1)
        progress.say("hello")
    assert file.getvalue() == ""


def on_a_terminal(monkeypatch, body, *, error=None) -> str:
    """What a terminal receives while ``body(progress)`` runs, and raises ``error`` if one is expected."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    parent, child = pty.openpty()
    received = bytearray()

    def collect():
        while chunk := os.read(parent, 4096):
            received.extend(chunk)
            if b"\x04end" in received:
                return

    reader = threading.Thread(target=collect)
    reader.start()
    with os.fdopen(child, "w") as terminal:
        try:
            with pytest.raises(error) if error else nullcontext(), Progress(600, file=terminal) as progress:
                body(progress)
        finally:
            terminal.write("\x04end")
            terminal.flush()
            reader.join(timeout=10)
    os.close(parent)
    return received.decode()


def test_a_bar_on_a_terminal(monkeypatch):
    def body(progress):
        with progress.doing("compiling"):
            pass
        progress.update(150, loss=3.2, tokens_per_second=12345)
        progress.say("[step] 150")
        print("from elsewhere")

    text = on_a_terminal(monkeypatch, body)
    assert "compiling" in text
    assert "150/600" in text
    assert "25%" in text
    assert "loss 3.200  12,345 tokens/s" in text
    assert "[step] 150" in text
    assert "from elsewhere" in text, "output of others appears above the bar and does not break it"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible again"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_gives_the_terminal_back(monkeypatch, error):
    stdout, stderr = sys.stdout, sys.stderr

    def drawing() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if type(thread).__module__.startswith("rich.")]

    def body(progress):
        assert drawing()
        with progress.doing("saving"):
            raise error

    text = on_a_terminal(monkeypatch, body, error=error)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible again"
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    for thread in drawing():  # told to end, it may have a last breath to take
        thread.join(timeout=10)
    assert not drawing()
