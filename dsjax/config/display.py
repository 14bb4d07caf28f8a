"""A configuration as text for people: what the command line accepts."""

import shutil
import textwrap

from dsjax.config.fields import Field, spell, type_name, walk
from dsjax.config.run import RunConfig


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


def _visible(value: object) -> str:
    """The value as on the command line; empty ones and those with outer spaces in quotes."""
    text = spell(value)
    return text if text and text == text.strip() else repr(text)
