"""The ways in which a run ends before its last step."""

import signal
from types import FrameType

from dsjax.observe.progress import Progress


class Diverged(Exception):  # noqa: N818 (a state of the run, not a mistake in a call)
    """Too many steps in a row had a non-finite loss or gradient; the message is the diagnosis."""


class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to finish its step and save; a second one ends at once.

    Used as a context manager around the run; the former handlers come back at its end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def announce(self, progress: Progress) -> None:
        """Says what is about to happen."""
        if self.received is not None:
            progress.say(f"{self.received.name}: saving and stopping; once more stops without saving")
