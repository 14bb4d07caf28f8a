"""A configuration as text for people: what a run uses, and what the command line accepts."""

import shutil
import textwrap

from dsjax.config.fields import Field, spell, type_name, walk
from dsjax.config.run import RunConfig


def describe(config: RunConfig, base: RunConfig | None = None) -> str:
    """All fields, indented by room; those that differ from ``base`` carry a ``*`` and base's value.

    ``base`` is what the config file gave before the command line changed it; without one, the defaults
    of the dataclasses.
    """
    base_values = {field.path: field.value for field in walk(base or RunConfig())}
    lines, room = [], ""
    for field in walk(config):
        lines += _headings(room, field)
        room, _, name = field.path.rpartition(".")
        was = base_values[field.path]
        changed = field.value != was
        indent = "  " * field.path.count(".")
        note = f"  (was {_visible(was)})" if changed else ""
        lines.append(f"{'*' if changed else ' '} {indent}{name} = {_visible(field.value)}{note}")
    return "\n".join(lines)


def field_table(config: RunConfig) -> str:
    """Every field with its type, its value and the comment above it in the source, a room at a time."""
    width = max(min(shutil.get_terminal_size().columns, 120), 60)
    rooms: dict[str, list[Field]] = {}
    for field in walk(config):
        rooms.setdefault(field.path.rpartition(".")[0], []).append(field)
    lines = []
    for room, fields in rooms.items():
        lines.append(f"\n{room or 'the run as a whole'}")
        for field in fields:
            flag = f"  --config.{field.path}={_visible(field.value)}"
            lines.append(f"{flag:<57}  {type_name(field.annotation)}")
            lines += textwrap.wrap(field.comment, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _headings(room: str, field: Field) -> list[str]:
    """The names of the rooms that this field opens, coming from the room before it."""
    before, parts = room.split("."), field.path.split(".")[:-1]
    opened = [depth for depth in range(len(parts)) if parts[: depth + 1] != before[: depth + 1]]
    return [f"  {'  ' * depth}{parts[depth]}" for depth in opened]


def _visible(value: object) -> str:
    """The value as on the command line; empty ones and those with outer spaces in quotes."""
    text = spell(value)
    return text if text and text == text.strip() else repr(text)
