"""How many devices lie along each axis of the mesh."""

import dataclasses
import math

from dsjax.config.errors import ConfigError
from dsjax.config.freeze import Freezable


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig(Freezable):
    """Devices along each axis; their product is the number of devices.

    Sequences are shared out over data, fsdp and expert, the tokens of a sequence over context and tensor.
    """

    # Copies of everything, each with its own sequences: TPU slices, or nodes, between which the network is slow.
    data: int = 1
    # Shards of parameters and optimizer, each with its own sequences. 0: all devices that the other axes leave.
    fsdp: int = 0
    # Shards of the routed experts, each with its own sequences; what is not an expert is sharded over it as over fsdp.
    expert: int = 1
    # Pieces of a sequence; parameters are sharded over it as over fsdp.
    context: int = 1
    # Pieces of a sequence as well, and shards of the experts, of the vocabulary and of the weights of heads.
    tensor: int = 1

    def check(self) -> None:
        """Raises ConfigError for a negative axis, and for a 0 where there must be a number."""
        for name, size in self.axes().items():
            least = 0 if name == "fsdp" else 1
            if size < least:
                raise ConfigError(f"mesh.{name}={size} must be at least {least}: it is a number of devices")

    def axes(self) -> dict[str, int]:
        """The axes by name, from the slowest network to the fastest."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def sizes(self, devices: int) -> dict[str, int]:
        """The axes for so many devices, fsdp filled in.

        Raises ConfigError where they do not come to that number.
        """
        sizes = self.axes()
        others = math.prod(size for name, size in sizes.items() if name != "fsdp")
        asked = (
            " · ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1) or "mesh.fsdp=1"
        )
        if self.fsdp == 0:
            if devices % others:
                raise ConfigError(
                    f"{asked}: the axes but fsdp come to {others}, which does not divide the {devices} devices: change "
                    "one of them"
                )
            return sizes | {"fsdp": devices // others}
        if others * self.fsdp != devices:
            raise ConfigError(
                f"the mesh ({asked}) comes to {others * self.fsdp} devices, and there are {devices}: change one of "
                "them, or let mesh.fsdp=0 take what is left"
            )
        return sizes
