"""A configuration as JSON: what a workdir keeps as ``config.json``."""

import dataclasses
from typing import Any

from dsjax.config.run import RunConfig


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of JSON values, with every field; tuples become lists."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value
