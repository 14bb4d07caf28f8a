"""The mesh of devices that a run uses."""

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsjax.config import ConfigError, RunConfig
from dsjax.config.mesh import MeshConfig


def build_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over ``devices``, by default all there are; neighbours along an axis are neighbours in the network.

    Where devices are of several slices, ``data`` runs over the slices.

    Raises ConfigError where the axes do not come to the number of devices, or ``data`` not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    shape, slices = tuple(sizes.values()), len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        if sizes["data"] % slices:
            raise ConfigError(
                f"mesh.data={sizes['data']} is not a multiple of the {slices} slices, between which only data runs: "
                f"use mesh.data={slices}"
            )
        within = (sizes["data"] // slices, *shape[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_of_run(config: RunConfig) -> Mesh | None:
    """The mesh of a run over all devices; None where there is one device, which needs none.

    Raises ConfigError for a mesh that does not fit the devices or the run.
    """
    check_fits(config, jax.device_count())
    return build_mesh(config.mesh) if jax.device_count() > 1 else None


_PART = "train.batch_size / train.accumulation_steps"


def check_fits(config: RunConfig, devices: int) -> None:
    """Raises ConfigError for a mesh whose axes do not divide what is shared out over them."""
    model, train, sizes = config.model, config.train, config.mesh.sizes(devices)
    batch = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    pieces, shards = sizes["context"] * sizes["tensor"], sizes["expert"] * sizes["tensor"]
    shards_of_weights = sizes["fsdp"] * sizes["expert"] * sizes["context"]
    halves = 2 * pieces if pieces > 1 else 1
    for name, value, divisor, axes in (
        (_PART, train.sequences_at_once, batch, "data · fsdp · expert"),
        ("train.sequence_length", train.sequence_length, halves, "2 · context · tensor"),
        ("model.hidden_size", model.hidden_size, shards_of_weights, "fsdp · expert · context"),
        ("model.num_attention_heads", model.num_attention_heads, sizes["tensor"], "tensor"),
        ("model.n_routed_experts", model.n_routed_experts, shards, "expert · tensor"),
        ("model.vocab_size", model.vocab_size, shards, "expert · tensor"),
    ):
        if value % divisor:
            of_mesh = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if axis in axes)
            raise ConfigError(
                f"{name}={value} is not a multiple of {divisor}, which is {axes} of the mesh ({of_mesh}): change one "
                "of them"
            )
