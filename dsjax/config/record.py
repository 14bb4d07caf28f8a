"""A configuration as JSON: what a workdir keeps as ``config.json``."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsjax.config.fields import spell
from dsjax.config.model import ModelConfig, RopeScaling
from dsjax.config.run import RunConfig


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of JSON values, with every field; tuples become lists."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def model_from_dict(record: dict[str, Any]) -> ModelConfig:
    """The model of a ``to_dict``. Raises KeyError or TypeError for what is none."""
    fields = record["model"]
    return ModelConfig(**fields | {"rope_scaling": RopeScaling(**fields["rope_scaling"])})


class Difference(NamedTuple):
    """A field that two records have different values of, as one writes them on the command line."""

    name: str
    before: str
    after: str


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Difference]:
    """The fields of ``after`` that ``before`` lacks or has another value of; both are of ``to_dict``."""
    old = _flat(before)
    for name, value in _flat(after).items():
        if old.get(name) != value:
            yield Difference(name, _spelt(old.get(name)), _spelt(value))


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _spelt(value: object) -> str:
    """A JSON value as one writes it on the command line."""
    return spell(tuple(value) if isinstance(value, list) else value)
