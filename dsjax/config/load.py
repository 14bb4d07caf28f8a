"""The command line of ``train.py`` and ``eval.py``: flags in, a checked and frozen run out.

A program is ``load.main(run, about=__doc__)`` with ``run(command)``. Whatever the user got wrong, here or
later in the program, is a ConfigError and ends as one sentence on stderr and exit status 2.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from dsjax.config import overrides
from dsjax.config.config_file import choices, load_file, titles
from dsjax.config.display import field_table
from dsjax.config.errors import ConfigError
from dsjax.config.run import RunConfig

_USAGE = """
python {program} --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]

  --config      a Python file with get_config() -> RunConfig{files}
  --workdir     the folder of the run, with its checkpoints, metrics and samples: train.py makes it, or goes
                on with the run in it; eval.py reads it
  --config.*    one field changed, for example
                    --config.train.steps=10  --config.optimizer.lr=3e-4
                    --config.log.tensorboard=false  or  --noconfig.log.tensorboard
                    --config.data.paths=a.txt,b.txt  or  --config.data.paths=a.txt --config.data.paths=b.txt

Fields, with their values in {source}:
"""


class Command(NamedTuple):
    """What the command line asks for."""

    config: RunConfig  # with the overrides, checked and frozen
    workdir: Path


def main(run: Callable[[Command], None], *, about: str | None = None) -> None:
    """Runs a program on the command line; a ConfigError at any time becomes a sentence and exit status 2."""
    try:
        run(parse(sys.argv, about=about))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def parse(argv: Sequence[str], *, about: str | None = None) -> Command:
    """Reads ``argv``, the program's name first. Flags of other libraries go to ``absl.flags.FLAGS``.

    Raises:
        ConfigError: anything that the user can set right, with how.
        SystemExit: after ``--help``, which begins with ``about``.
    """
    try:
        arguments = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=True)
        own, rest = _own_flags(arguments)
    except flags.Error as error:
        raise ConfigError(f"{error}: write --FLAG=VALUE") from error
    if own["help"].value:
        _print_for_pager(_help(_program(argv[0]), about, own["config"].value))
        raise SystemExit(0)
    if not own["config"].value:
        raise ConfigError(f"--config=FILE is missing: {choices()}")
    config, rest = overrides.apply(load_file(own["config"].value), rest)
    _refuse_unknown(argv[0], rest, own)
    workdir = _workdir(own["workdir"].value)
    config.check()
    return Command(config.freeze(), workdir)


def _own_flags(arguments: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Our own flags, in a FlagValues of their own so that parsing twice in a process is no error."""
    own = flags.FlagValues()
    own.set_gnu_getopt()
    flags.DEFINE_string("config", None, "", flag_values=own)
    flags.DEFINE_string("workdir", None, "", flag_values=own)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=own)
    return own, own(["", *arguments], known_only=True)[1:]


def _refuse_unknown(program: str, arguments: list[str], own: flags.FlagValues) -> None:
    """Gives what is left to the flags that libraries define; what they do not know is an error."""
    try:
        left = flags.FLAGS([program, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, [*own, *flags.FLAGS], n=1)
        remedy = (
            f"did you mean --{near[0]}?"
            if near
            else "those here are --config, --workdir, --config.FIELD, --help"
        )
        raise ConfigError(f"--{error.flagname} is not a flag: {remedy}") from error
    except (flags.Error, ValueError) as error:
        raise ConfigError(f"{error}: write --FLAG=VALUE") from error
    if left:
        raise ConfigError(
            f"{left[0]!r} belongs to no flag: flags are written --FLAG=VALUE, in quotes around spaces"
        )


def _workdir(text: str | None) -> Path:
    if not text:
        raise ConfigError(
            "--workdir=DIR is missing: name a folder for checkpoints and metrics, such as /tmp/run1"
        )
    if "://" in text:
        raise ConfigError(f"--workdir={text} is a URL: mount the bucket and name the folder it is mounted at")
    workdir = Path(text).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={text} is a file: name a folder, which is made if need be")
    return workdir


def _print_for_pager(text: str) -> None:
    """Prints to a reader that may stop reading: ``--help | head``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # and Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _program(path: str) -> str:
    """What follows ``python`` on the command line: a file, or ``-m`` and the module that was run so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and path.endswith(spec.name.replace(".", "/") + ".py"):
        return f"-m {spec.name}"
    return Path(path).name


def _help(program: str, about: str | None, config_path: str | None) -> str:
    """The docstring of the program, how to override, and every field."""
    config = load_file(config_path) if config_path else RunConfig()
    files = "".join(f"\n                    {path}  {title}" for path, title in titles().items())
    usage = _USAGE.format(
        program=program, files=files, source=config_path or "the dataclasses (no --config given)"
    )
    return (about or "").strip() + "\n" + usage + field_table(config)
