"""Devices that are not here, for programs that are compiled and not run."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from dsjax.config import ConfigError
from dsjax.planning.chips import Chip, chip_of

# What the compiler asks of a device. Source: CUDA's device query for this one.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584 clock_rate_ghz: 1.98
}
platform_name: "CUDA" runtime_version { major: 12 minor: 9 patch: 0 } dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Without them libtpu asks the cloud which machine this is.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # no device is used: several plans may be made at a time
}
_SHAPES = {
    1: "GPUs are one number, such as h100:64",
    2: "a slice of these is two numbers of chips, such as v6e:16x16",
    3: "a slice of these is three numbers of chips, such as v5p:8x8x8",
}


def devices_of(topology: str) -> tuple[list[Any], Chip]:
    """Devices and kind of ``v5p:8x8x8``, ``2*v5p:8x8x8`` (two slices) or ``h100:64``.

    Raises ConfigError where there is no such topology, or no compiler for it is installed.
    """
    parts = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", topology)
    if parts is None:
        raise ConfigError(f"--topology={topology} is not written like v5p:8x8x8, 2*v5p:8x8x8 or h100:64")
    slices, name, shape = int(parts[1] or 1), parts[2], parts[3]
    chip = chip_of(name)
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != chip.dimensions or not all([slices, *sizes]) or (slices > 1 and chip.devices_per_node):
        raise ConfigError(f"--topology={topology}: {_SHAPES[chip.dimensions]}")
    jax.config.update("jax_platforms", "cpu")
    try:
        if chip.devices_per_node:
            return _gpus(int(shape), chip), chip
        for variable, value in _NO_TPU_HERE.items():
            os.environ.setdefault(variable, value)
        more = {"num_slices": slices} if slices > 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **more)
        return list(found.devices), chip
    except ConfigError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--topology={topology}: {first}{_way_out(chip)}") from error


def _gpus(count: int, chip: Chip) -> list[Any]:
    of_node = min(count, chip.devices_per_node)
    if count % of_node:
        raise ConfigError(
            f"--topology: {count} GPUs are no number of nodes of {of_node}: use a multiple of it"
        )
    found = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{count // of_node}x{of_node}", target_config=H100
    )
    return list(found.devices)


def _way_out(chip: Chip) -> str:
    module, extra = ("jax_cuda12_plugin", "cuda12") if chip.devices_per_node else ("libtpu", "tpu")
    return "" if importlib.util.find_spec(module) else f": its compiler comes with pip install 'jax[{extra}]'"
