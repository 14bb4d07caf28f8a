"""What the fields of the configuration dataclasses are: path, type, value, and the comment in the source."""

import ast
import dataclasses
import functools
import inspect
import io
import math
import tokenize
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from dsjax.config.errors import ConfigError


class Field(NamedTuple):
    """One value of a run, such as ``train.steps``."""

    path: str
    annotation: Any
    value: Any
    comment: str


def walk(config: Any, prefix: str = "") -> Iterator[Field]:
    """Every field of a configuration dataclass, nested ones in place, in the order of the source."""
    for name, annotation in annotations(type(config)).items():
        value, path = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(annotation) and isinstance(value, typing.cast(type, annotation)):
            yield from walk(value, path + ".")
        else:
            yield Field(path, annotation, value, comments(type(config)).get(name, ""))


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """The fields of a dataclass and their types, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def comments(kind: type) -> dict[str, str]:
    """The documentation of each field: the comment lines right above it and the one behind it.

    A comment with an empty line below it is a heading and belongs to no field.
    """
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
        token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    definition = typing.cast(ast.ClassDef, ast.parse(source).body[0])
    found = {}
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        words = [by_line[node.end_lineno]] if node.end_lineno in by_line else []
        above = node.lineno - 1
        while above in by_line and lines[above - 1].lstrip().startswith("#"):
            words.insert(0, by_line[above])
            above -= 1
        found[node.target.id] = " ".join(words)
    return found


def type_name(annotation: Any) -> str:
    """A type as the command line's help shows it: ``int``, ``float32|bfloat16``, ``str,...``."""
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return f"{type_name(typing.get_args(annotation)[0])},..."
    return annotation.__name__


def spell(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def wanted(annotation: Any) -> str:
    """What a value of the type must be, as the end of a sentence that begins "must be"."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return "a tuple of strings"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}
    return names.get(annotation, f"a {annotation.__name__}")


def fits(annotation: Any, value: Any) -> bool:
    """Whether a value has the type; whole numbers fit where numbers do, and no number may be infinite."""
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, annotation)


def check_types(config: Any, prefix: str = "") -> None:
    """Raises ConfigError for the first field whose value has not its type; dataclasses do not look."""
    for field in walk(config, prefix):
        if not fits(field.annotation, field.value):
            raise ConfigError(f"{field.path}={field.value!r} must be {wanted(field.annotation)}")
