"""Preparing a set, whoever does the work."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dsjax.config import ConfigError
from dsjax.data.manifest import read_manifest
from dsjax.data.plan import Plan, begin, check_same, held, refuse_others
from dsjax.data.settings import Names, Settings
from dsjax.data.tokenizer import Tokenizer


def prepare_set(
    folder: Path,
    settings: Settings,
    engine: Callable[[Plan], None],
    *,
    names: Names = Names(),  # noqa: B008, frozen
    given: Tokenizer | None = None,
) -> bool:
    """Makes ``folder`` a prepared set, going on where an earlier start was interrupted; returns whether it was one.

    ``given`` is a tokenizer to use where ``settings`` names none. Several processes may ask for a folder at a time: one
    does the work, the others wait for it.

    Errors: ConfigError for settings, text and tokenizers that cannot be used, and for a folder that holds something
    else, or was prepared with other settings.
    """
    refuse_others(folder)
    with held(folder):
        if (folder / "manifest.json").exists():
            check_same(read_manifest(folder)["config"], settings, names, folder)
            shutil.rmtree(folder / "work", ignore_errors=True)  # the last thing to do, and it was not done
            return True
        try:
            engine(begin(folder, settings, names, given))
        except OSError as error:
            raise ConfigError(
                f"{error.filename or folder} cannot be written or read ({error.strerror or error}): when that is "
                "mended, the same command goes on where it was"
            ) from error
        return False
