"""Overrides on the command line, ``--config.train.steps=10``, applied to the dataclasses of a run.

ml_collections reads the values by the types of the fields; the names are looked up here first, because
its errors name Python classes and not the flag that would have worked.
"""

import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from dsjax.config.errors import ConfigError
from dsjax.config.fields import Field, spell, walk, wanted
from dsjax.config.run import RunConfig


def apply(config: RunConfig, arguments: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """A copy of the configuration with every ``--config.*`` applied, and the arguments that are others.

    Raises:
        ConfigError: no such field, or a value of the wrong type.
    """
    fields = {field.path: field for field in walk(config)}
    for argument in arguments:
        if match := re.match(r"--?(no)?config\.([^=]*)", argument, re.DOTALL):
            _check_name(fields, argument, path=match[2], negated=bool(match[1]))
    for field in fields.values():
        _register_parser(field.annotation)
    argv = ["", *arguments]
    values = flags.FlagValues()
    values.set_gnu_getopt()
    holder = config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        raise _wrong_value(error, fields) from error
    except (flags.Error, ValueError) as error:  # a flag without its value; --noconfig.x=y
        raise ConfigError(f"{error}: write --config.FIELD=VALUE") from error
    return holder.value, rest


class _ChoiceParser(flags.ArgumentParser):
    """For ``Literal`` of strings, which ml_collections does not know."""

    def __init__(self, choices: tuple[str, ...]):
        self.choices = choices

    def parse(self, argument: str) -> str:
        if argument not in self.choices:
            raise ValueError(argument)
        return argument


class _StringsParser(tuple_parser.TupleParser):
    """For tuples of strings: split at commas. ml_collections would evaluate them as Python.

    A subclass of TupleParser, because for those a repeated flag adds to the tuple.
    """

    def parse(self, argument: str | tuple[str, ...]) -> tuple[str, ...]:
        if isinstance(argument, tuple):
            return argument
        return tuple(part for part in argument.split(",") if part)


def _register_parser(annotation: Any) -> None:
    if typing.get_origin(annotation) is Literal:
        parser = _ChoiceParser(typing.get_args(annotation))
        config_flags.register_flag_parser_for_type(annotation, parser)
    elif annotation == tuple[str, ...]:
        config_flags.register_flag_parser_for_type(annotation, _StringsParser())


def _check_name(fields: dict[str, Field], argument: str, *, path: str, negated: bool) -> None:
    if path in fields:
        if negated and fields[path].annotation is not bool:
            raise ConfigError(f"{argument} is for true-or-false fields only: write --config.{path}=VALUE")
        return
    rooms = _rooms(list(fields))
    if path in rooms and path:
        inside = next(field for field in fields.values() if field.path.startswith(path + "."))
        example = f"--config.{inside.path}={spell(inside.value)}"
        raise ConfigError(
            f"{argument} gives a value to all of {path}: set one of its fields, such as {example}"
        )
    near = _nearest(rooms, list(fields), path)
    if near in fields:
        remedy = f"did you mean --config.{near}?"
    elif near:
        remedy = f"did you mean a field of {near}, such as --config.{near}.{rooms[near][0]}?"
    else:
        room = path
        while room not in rooms:
            room = room.rpartition(".")[0]
        remedy = f"{room or 'config'} has {', '.join(rooms[room])}"
    raise ConfigError(f"{argument}: there is no field {path or 'of that name'}; {remedy}")


def _rooms(paths: list[str]) -> dict[str, list[str]]:
    """The names in each room, and in the whole, whose name is empty."""
    rooms: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        for depth, name in enumerate(parts):
            names = rooms.setdefault(".".join(parts[:depth]), [])
            if name not in names:
                names.append(name)
    return rooms


def _nearest(rooms: dict[str, list[str]], paths: list[str], path: str) -> str:
    """The field or room most likely meant: of the same last name elsewhere, or else near part by part."""
    same_name = [other for other in paths if other.split(".")[-1] == path.split(".")[-1]]
    if same_name:
        return difflib.get_close_matches(path, same_name, n=1, cutoff=0)[0]
    near = ""
    for part in path.split("."):
        close = difflib.get_close_matches(part, rooms.get(near, ()), n=1)
        if not close:
            return ""
        near = f"{near}.{close[0]}".strip(".")
    return near


def _wrong_value(error: flags.IllegalFlagValueError, fields: dict[str, Field]) -> ConfigError:
    """Turns absl's ``flag --config.PATH=TEXT: REASON`` into what the field must be, with an example."""
    match = re.match(r"flag --config\.([\w.]+)=", str(error))
    if match is None:
        return ConfigError(str(error))
    field = fields[match[1]]
    text = str(error)[match.end() :].removesuffix(f": {error.__context__}")
    # The value it has now is an example of the right type; among named choices it would be one too many.
    is_choice = typing.get_origin(field.annotation) is Literal
    example = "" if is_choice else f", such as --config.{field.path}={spell(field.value)}"
    return ConfigError(f"--config.{field.path}={text} must be {wanted(field.annotation)}{example}")
