"""Metrics of a run as JSON lines, and the same scalars for TensorBoard."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, SupportsFloat

from tensorboardX import SummaryWriter

_NOT_JSON = ("nan", "inf", "-inf")


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and ``timing.jsonl`` in the workdir, one object a line.

    What depends on the clock goes to ``timing.jsonl``, so that ``metrics.jsonl`` is the same bit for bit
    whether a run went through or was killed and resumed. Write the metrics of a step before its checkpoint
    is saved: resuming from the checkpoint of step n keeps the lines up to n and expects them there.

    Every line is handed to the operating system as it is written; a killed run loses the unfinished one
    at most. One process of a run writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, tensorboard: bool, resume_step: int | None = None):
        """Removes what a killed run wrote after ``resume_step``, or all that is there where it is None."""
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        last_step = -1 if resume_step is None else resume_step
        self._metrics = _open_after(folder / "metrics.jsonl", last_step)
        self._timing = _open_after(folder / "timing.jsonl", last_step)
        self._board = None
        if tensorboard:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends what the computation says, such as ``{"train/loss": loss}``: scalars of any kind."""
        self._write(self._metrics, step, metrics)

    def write_timing(self, step: int, timing: Mapping[str, SupportsFloat]) -> None:
        """Appends what the clock says: tokens a second, MFU, seconds."""
        self._write(self._timing, step, timing)

    def _write(self, file: Any, step: int, values: Mapping[str, SupportsFloat]) -> None:
        scalars = {name: _scalar(value) for name, value in values.items()}
        file.write(json.dumps({"step": step} | {name: _to_json(x) for name, x in scalars.items()}) + "\n")
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Writes out what TensorBoard has not yet, and closes the files."""
        self._metrics.close()
        self._timing.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentWriter(contextlib.AbstractContextManager):
    """In place of a ``MetricsWriter`` in all processes of a run but the one that writes."""

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Nothing."""

    def write_timing(self, step: int, timing: Mapping[str, SupportsFloat]) -> None:
        """Nothing."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order, as far as they are complete."""
    return [
        {name: float(value) if value in _NOT_JSON else value for name, value in json.loads(line).items()}
        for line in _complete_lines(Path(path))
    ]


def _scalar(value: Any) -> int | float:
    """A Python number from one or from an array with one element; raises on more."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _to_json(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(value)


def _open_after(path: Path, last_step: int) -> Any:
    """Opens for appending once no line of a later step, and no torn line, is left."""
    if path.exists():
        kept = b"".join(line for line in _complete_lines(path) if _step_of(line) <= last_step)
        if kept != path.read_bytes():
            _replace(path, kept)
    return path.open("a", encoding="utf-8", buffering=1)


def _complete_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _step_of(line: bytes) -> float:
    """The line's step; infinite for one that a crash of the machine left unreadable, so that it goes."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def _replace(path: Path, content: bytes) -> None:
    """Swaps the file's content in one step: whoever kills us finds the old one or the new one."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
