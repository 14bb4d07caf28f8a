"""What accelerators can do: the limits that a plan is held against."""

from typing import NamedTuple

from dsjax.config import ConfigError


class Chip(NamedTuple):
    """One JAX device and its place in the network; bandwidths are one way, in bytes a second."""

    kind: str  # the beginning of device_kind
    flops_per_second: float  # dense bfloat16
    memory_bytes: float
    memory_bandwidth: float
    devices_per_chip: int = 1
    link_bandwidth: float = 0.0  # of one of the links that a TPU chip has to each neighbour
    closes_at: int = 4  # chips: dimensions of a TPU slice are rings where all are multiples of it
    dimensions: int = 3  # of the torus of a slice
    devices_per_node: int = 0  # of GPUs, that have a fast network among them
    node_bandwidth: float = 0.0  # of a GPU, to others of its node
    outer_bandwidth: float = 0.0  # of a device, to other nodes or slices


# Memory of a TPU7x is what its compiler says is to be had.
# Source of all else: the tables of cloud.google.com/tpu/docs/{v5p,v6e,tpu7x}: a chip sends and receives 1,200, 800 and
# 1,200 GB/s, both ways together, over 6, 4 and 6 links. A TPU7x is two devices, that share its links.
# Source: the H100 SXM data sheet; one 400 Gbit/s network card a GPU, as in DGX H100.
CHIPS = {
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, link_bandwidth=100e9, outer_bandwidth=6.25e9),
    "v6e": Chip(
        "TPU v6 lite",
        918e12,
        32e9,
        1600e9,
        link_bandwidth=100e9,
        closes_at=16,
        dimensions=2,
        outer_bandwidth=12.5e9,
    ),
    "tpu7x": Chip(
        "TPU7x",
        2307e12 / 2,
        94.75 * 2**30,
        7380e9 / 2,
        devices_per_chip=2,
        link_bandwidth=100e9,
        outer_bandwidth=6.25e9,
    ),
    "h100": Chip(
        "NVIDIA H100",
        989.4e12,
        80e9,
        3352e9,
        dimensions=1,
        devices_per_node=8,
        node_bandwidth=450e9,
        outer_bandwidth=50e9,
    ),
}


def chip_of(name: str) -> Chip:
    """By the name that a topology begins with. Raises ConfigError for others."""
    if name not in CHIPS:
        raise ConfigError(f"--topology: {name!r} is not known: use one of {', '.join(CHIPS)}")
    return CHIPS[name]
