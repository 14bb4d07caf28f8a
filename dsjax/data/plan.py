"""What is prepared and how the work is divided: decided first, kept beside the work, the same for every process of it.

A prepared set is a folder: ``manifest.json``, written last, ``tokenizer.json``, ``rejects.jsonl`` and the shards
``train-00000`` … and ``heldout-00000`` …; ``work/`` is there as long as it is not whole.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError
from dsjax.data.files import write_json
from dsjax.data.inputs import find_tasks
from dsjax.data.readers import Part, Reject
from dsjax.data.settings import Names, Settings
from dsjax.data.tokenizer import Tokenizer, check_holds_bytes, load_tokenizer

# Raised by whoever changes what the files hold, so that old ones are refused instead of misread.
MADE_BY = "dsjax.data 2"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work on one set."""

    folder: Path
    settings: Settings
    tasks: list[list[Part]]
    rejects: list[Reject]  # files that cannot be read
    tokenizer_hash: str  # of the file that was given, or ""

    @property
    def work(self) -> Path:
        """Where results stand between stages."""
        return self.folder / "work"

    def size_bytes(self, task: int) -> int:
        """The work of reading that there is in a task."""
        return sum(part.size_bytes for part in self.tasks[task])

    def save(self) -> None:
        """Writes it for other processes."""
        fields = {name: value for name, value in vars(self).items() if name != "folder"}
        write_json(self.work / "plan.json", {"made_by": MADE_BY, **fields, "settings": vars(self.settings)})


def load_plan(folder: Path) -> Plan:
    """What ``begin`` wrote in a folder. Errors: ConfigError if it cannot be read."""
    path = folder / "work" / "plan.json"
    try:
        return _parsed(folder, path.read_bytes(), MADE_BY)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the plan of a work that can go on ({error!r}): delete {folder} to begin again"
        ) from None


@functools.lru_cache(1)  # every task of a worker asks
def _parsed(folder: Path, content: bytes, made_by: str) -> Plan:
    read = json.loads(content)
    if read["made_by"] != made_by:
        raise ValueError(f"it was made by {read['made_by']}")
    settings = Settings(**read["settings"] | {"inputs": tuple(read["settings"]["inputs"])})
    tasks = [[_part(*fields) for fields in task] for task in read["tasks"]]
    rejects = [Reject(*fields) for fields in read["rejects"]]
    return Plan(folder, settings, tasks, rejects, read["tokenizer_hash"])


def _part(path: str, name: str, start: int, stop: int, size_bytes: int, stamp: list[int]) -> Part:
    return Part(Path(path), name, start, stop, size_bytes, (stamp[0], stamp[1]))


def begin(folder: Path, settings: Settings, names: Names, given: Tokenizer | None = None) -> Plan:
    """The plan of a folder that is not whole yet: a new one, or that of a work which was interrupted.

    ``given`` is the tokenizer to use where ``settings`` names no file of one.

    Errors: ConfigError for inputs and tokenizers that cannot be used, for a folder in which something else stands, and
    for a work that was begun with other settings or files.
    """
    if settings.tokenizer:
        given = load_tokenizer(settings.tokenizer, called=f"{names.of('tokenizer')}={settings.tokenizer!r}")
    if given and settings.vocab_size:
        given.check_fits(settings.vocab_size, called=names.vocab_size)
    if not given:
        check_holds_bytes(settings.vocab_size, called=names.vocab_size)
    tokenizer_hash = hashlib.blake2b(given.definition.encode(), digest_size=16).hexdigest() if given else ""
    tasks, rejects = find_tasks(settings.inputs, names.inputs, folder)
    wanted = Plan(folder, settings, tasks, rejects, tokenizer_hash)
    if (folder / "work" / "plan.json").exists():
        begun = load_plan(folder)
        check_same(vars(begun.settings), settings, names, folder)
        if begun != wanted:
            raise ConfigError(
                f"the work in {folder} was begun with other {_difference(begun, wanted)}: delete it to begin again"
            )
        return begun
    shutil.rmtree(wanted.work, ignore_errors=True)
    wanted.work.mkdir()
    if given:
        given.save(wanted.work / "tokenizer.json")
    wanted.save()
    return wanted


def refuse_others(folder: Path) -> None:
    """Raises ConfigError if a folder that is no prepared set, and none in work, has anything in it."""
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if {"manifest.json", "work"} & set(others) or not set(others) - {".lock"}:
        return
    if set(others) <= {".lock", "tokenizer.json"}:
        raise ConfigError(f"{folder} is of a run on data.sets: name them again, or use another workdir")
    raise ConfigError(
        f"{folder} is where a prepared set is to be and holds something else ({', '.join(others[:3])}): "
        "use another folder, or delete this one if nothing else is in it"
    )


def _difference(begun: Plan, wanted: Plan) -> str:
    if begun.tokenizer_hash != wanted.tokenizer_hash:
        return "tokenizer"
    before, now = ({part for task in plan.tasks for part in task} for plan in (begun, wanted))
    changed = sorted(part.name for part in before ^ now)
    return f"files, such as {changed[0]}" if changed else "files"


def check_same(prepared: dict[str, Any], wanted: Settings, names: Names, folder: Path) -> None:
    """Raises ConfigError where a folder was prepared with other settings."""
    for field, value in vars(wanted).items():
        before = tuple(prepared[field]) if isinstance(value, tuple) else prepared[field]
        if before != value:
            raise ConfigError(
                f"{names.of(field)}={value!r}, and {folder} was prepared with {before!r}: use that value, another "
                "folder, or delete this one if nothing needs it"
            )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes from working in it, which wait until this one ends however it may."""
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except UnicodeEncodeError:
        raise ConfigError(f"{folder!r} is not UTF-8, as names of prepared sets must be") from None
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made or written ({error.strerror}): name another folder"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
