"""How long the processes of a run wait for each other."""

import dataclasses

from dsjax.config.errors import ConfigError
from dsjax.config.freeze import Freezable


@dataclasses.dataclass(unsafe_hash=True)
class HostsConfig(Freezable):
    """Waiting of the processes of one run, of which each host of a pod has one."""

    # Seconds for all processes to come, from the start of each.
    start_timeout_seconds: int = 300
    # Seconds without a sign of life after which a process is taken for dead, and the others end.
    silence_timeout_seconds: int = 60

    def check(self) -> None:
        """Raises ConfigError for times that are none."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ConfigError(f"hosts.{field.name}={value} must be at least 1: it is seconds")
