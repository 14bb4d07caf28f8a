"""The ways in which a run ends before its last step."""

import itertools
import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Diverged(Exception):  # noqa: N818 (a state of the run, not a mistake in a call)
    """Too many steps in a row had a non-finite loss or gradient; the message is the diagnosis."""


class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to finish its step and save; a second one ends the process at once.

    Used as a context manager around the run; the former handlers come back at its end. Of several processes any may
    get the signal: JAX's preemption service notes SIGTERM, and all stop after the same step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noted = signal.SIGTERM
        # Counts in one instruction: between any two another signal may come.
        self._before = itertools.count()
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        self._alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def before(self, step: int) -> bool:
        """Whether the run is to end instead of taking this step; asked by every process before every step."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            self.received = self._noted
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if next(self._before):
            _say("stopped at once; the last finished checkpoint stands")
            os._exit(128 + number)  # threads that compile or save would keep an ordinary exit waiting
        self._noted = signal.Signals(number)
        _say(f"{self._noted.name}: stopping after this step; once more stops at once, without saving")
        if self._alone:
            self.received = self._noted
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others of


def _say(text: str) -> None:
    """Writes past Python's buffers, which a signal may have found half written; shows the cursor again."""
    cursor = "\x1b[?25h" if os.isatty(2) else ""
    os.write(2, f"{cursor}\n{text}\n".encode())
