"""How far the reading or writing of many gigabytes is: a bar on a terminal, lines elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from dsjax.observe.progress import duration

_SECONDS_BETWEEN_LINES = 10.0


class QuietlyBrokenConsole(Console):
    """A console whose reader may go away, as in ``| head``: what is said is lost then, and the work goes on."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Transfer:
    """Shows bytes done, bytes a second and the time left, while the ``with`` block runs; threads may share it.

    Where there are none to count, it shows that the work goes on, and how long it took.
    """

    def __init__(
        self,
        title: str,
        total_bytes: int,
        *,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = QuietlyBrokenConsole(file=file, force_jupyter=False)
        self._title, self._total, self._clock = title, total_bytes, clock
        self._done = self._skipped = 0
        self._start = self._last_line = clock()
        self._lock = threading.Lock()
        self._bar = None
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), *columns, console=self._console
            )
            self._task = self._bar.add_task(title, total=total_bytes or None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, size_bytes: int, *, was_there: bool = False) -> None:
        """Tells that ``size_bytes`` more are done, or that they had been done before and took no time."""
        with self._lock:
            self._done += size_bytes
            self._skipped += size_bytes * was_there
            if self._bar:
                self._bar.update(self._task, completed=self._done)
            elif self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._line()

    def _line(self) -> None:
        now = self._clock()
        self._last_line = now
        seconds = max(now - self._start, 1e-9)
        speed = (self._done - self._skipped) / seconds
        line = self._title
        if self._total:
            line += f": {decimal(self._done)} of {decimal(self._total)}, {decimal(int(speed))}/s"
        if self._done < self._total and speed:
            line += f", {duration((self._total - self._done) / speed)} left"
        elif self._done == self._total:
            line += f", done in {duration(seconds)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()
