"""A configuration as JSON: what a workdir keeps as ``config.json`` and a notebook loads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config.errors import ConfigError
from dsjax.config.fields import annotations
from dsjax.config.run import RunConfig


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of JSON values, with every field; tuples become lists."""
    return _plain(config)


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """The inverse of ``to_dict``: ``from_dict(json.loads(text))``, checked and frozen.

    Raises:
        ConfigError: an unknown or a missing key, a value of the wrong type, or a run that cannot work.
    """
    config = _build(RunConfig, data, "")
    config.check()
    return config.freeze()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _build(kind: Any, data: Any, prefix: str) -> Any:
    kinds = annotations(kind)
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'the configuration'}={data!r} must be a dictionary of fields"
        )
    for name in data:
        if name not in kinds:
            raise ConfigError(
                f"{prefix}{name} is no field of this version: the fields are {', '.join(kinds)}"
            )
    arguments = {}
    for name, annotation in kinds.items():
        if name not in data:
            raise ConfigError(f"{prefix}{name} is missing: add it, for example with its default value")
        value = data[name]
        if dataclasses.is_dataclass(annotation):
            value = _build(annotation, value, f"{prefix}{name}.")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)
