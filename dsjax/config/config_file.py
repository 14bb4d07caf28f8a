"""A file of ``configs/``: Python with a function ``get_config() -> RunConfig``."""

import ast
import runpy
import traceback
from pathlib import Path

from dsjax.config.errors import ConfigError
from dsjax.config.fields import check_types
from dsjax.config.run import RunConfig


def load_file(path: str) -> RunConfig:
    """What the file's ``get_config()`` returns, its types checked, not yet frozen.

    Raises:
        ConfigError: no such file, no ``get_config``, it raises, or returns something else.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config={path} is not a file: {_files_instead(path)}")
    try:
        get_config = runpy.run_path(path).get("get_config")
    except Exception as error:
        raise ConfigError(f"--config={path} {_what_was_raised(error, path)}") from error
    if not callable(get_config):
        raise ConfigError(f"--config={path} has no function get_config() that returns a RunConfig: add one")
    try:
        config = get_config()
    except Exception as error:
        raise ConfigError(f"--config={path}: get_config() {_what_was_raised(error, path)}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"--config={path}: get_config() returns a {type(config).__name__}: it must return a RunConfig"
        )
    if config.frozen:
        raise ConfigError(f"--config={path}: get_config() returns a frozen RunConfig: leave out freeze()")
    try:
        check_types(config)
    except ConfigError as error:
        raise ConfigError(f"--config={path}: {error}") from error
    return config


def titles() -> dict[str, str]:
    """The files in ``configs/`` here, each with the first line of its docstring."""
    found = {}
    for path in sorted(Path("configs").glob("[!_]*.py")):
        try:
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        except (OSError, SyntaxError, ValueError):  # listed all the same: loading it says what is wrong
            docstring = None
        found[path.as_posix()] = (docstring or "").partition("\n")[0]
    return found


def choices() -> str:
    """The end of a sentence that names what ``--config`` could be."""
    files = ", ".join(titles())
    return f"use one of {files}" if files else "name a Python file with get_config() -> RunConfig"


def _files_instead(path: str) -> str:
    in_folder = sorted(Path(path).glob("[!_]*.py")) if Path(path).is_dir() else []
    return f"use one of {', '.join(map(str, in_folder))}" if in_folder else choices()


def _what_was_raised(error: Exception, path: str) -> str:
    """``raises KeyError('x') in line 7``: the line of the config file, however deep below it."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"is not Python: {error.msg} in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    text = " ".join(str(error).split())
    return (
        f"raises {type(error).__name__}{f' ({text})' if text else ''} in line {lines[-1] if lines else '?'}"
    )
