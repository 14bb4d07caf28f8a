"""A folder that appears when it is complete, however often the work on it was interrupted."""

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from dsjax.checkpoint.array_files import write_error
from dsjax.checkpoint.errors import CheckpointError

_ORDER = "conversion.json"  # what the work was, as long as it is not done


@contextlib.contextmanager
def staged(target: Path, order: dict[str, Any]) -> Iterator[Path]:
    """``TARGET.partial``, which becomes ``target`` when the block ends; after an interruption the next call goes on.

    ``order`` is JSON that says what is being made: what was asked for, and digests of the ``files`` it is made from and
    of the ``plan`` by which. Raises CheckpointError where the target exists, where another
    process is at it, or where the interrupted work was of another order.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists: name a new folder, or move it away")
    folder = target.with_name(f"{target.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is being written by another process: wait for its end") from None
        except OSError:  # a file system without locks
            pass
        _claim(folder, order)
        yield folder
        try:
            folder.rename(target)
            # Afterwards: without them, a folder that is not yet renamed could be taken for work of another order.
            (target / _ORDER).unlink()
            (target / ".lock").unlink()
        except OSError as error:
            raise write_error(target, error) from error


def _claim(folder: Path, order: dict[str, Any]) -> None:
    path = folder / _ORDER
    order = json.loads(json.dumps(order))
    try:
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(order))
            partial.rename(path)
        begun = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise CheckpointError(f"{path} is not readable: delete {folder}") from None
    except OSError as error:
        raise write_error(path, error) from error
    if begun == order:
        return
    changed = [name for name in sorted(order.keys() | begun.keys()) if begun.get(name) != order.get(name)]
    asked = [name for name in changed if name not in ("files", "plan")]
    if not asked:
        what = f"the files of {order['source']}" if "files" in changed else "this program"
        raise CheckpointError(f"{what} changed since {folder} was begun: delete that folder")
    raise CheckpointError(
        f"{folder} was begun with {asked[0]} {begun.get(asked[0])}, not {order.get(asked[0])}: run the former "
        "command again, or delete the folder"
    )


def digest(value: Any) -> str:
    """Of what is being made, to be told from anything else; by its ``repr``."""
    return f"{zlib.crc32(repr(value).encode()):08x}"


def warn_if_scarce(folder: Path, needed_bytes: int) -> None:
    """Says so where the disk seems to lack room for what is to come; file systems do not always know."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes - there:
        print(
            f"{folder}: {decimal(needed_bytes - there)} are to be written and {decimal(free)} are free",
            flush=True,
        )
