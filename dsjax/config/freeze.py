"""Dataclasses that the command line may change and nothing else may."""

import dataclasses
from typing import Any, Self


class Freezable:
    """Base of the configuration dataclasses: mutable until ``freeze()``, hashable by value.

    Overrides such as ``--config.train.steps=10`` assign to fields, which frozen dataclasses forbid;
    modules and compiled functions need values that no longer change. So a run is built, overridden,
    checked, and then frozen once.
    """

    @property
    def frozen(self) -> bool:
        """Whether ``freeze()`` was called."""
        return getattr(self, "_frozen", False)

    def freeze(self) -> Self:
        """Forbids any further assignment, here and in nested dataclasses; returns ``self``."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, Freezable):
                value.freeze()
        object.__setattr__(self, "_frozen", True)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self.frozen:
            raise AttributeError(
                f"{type(self).__name__}.{name} cannot change any more: the configuration is frozen; "
                "use dataclasses.replace to make another one"
            )
        object.__setattr__(self, name, value)
