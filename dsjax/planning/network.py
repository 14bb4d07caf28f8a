"""What the collectives of a compiled program send, and how long the network takes for it."""

import collections
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dsjax.planning.chips import Chip
from dsjax.planning.hlo import Instruction, Program, Run

_KINDS = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}


class Collective(NamedTuple):
    """One kind of message along some axes of the mesh, executed ``times`` a step."""

    kind: str
    axes: tuple[str, ...]
    devices: int
    result: str  # such as bf16[4,7168,2048]
    largest: int  # numbers in the largest array of it
    bytes: float  # that a device receives each time
    times: int
    busy: dict[
        str, float
    ]  # seconds each time, at their limit, by parts of the network: x, y and z of a torus
    op_name: str

    @property
    def seconds(self) -> float:
        """Each time, with the network to itself."""
        return max(self.busy.values(), default=0.0)


def busy_seconds(collectives: Iterable[Collective]) -> dict[str, float]:
    """How long each part of the network works in a step. They work side by side: the longest is the network's time."""
    sums: dict[str, float] = collections.defaultdict(float)
    for collective in collectives:
        for part, seconds in collective.busy.items():
            sums[part] += seconds * collective.times
    return dict(sums)


def collective_of(program: Program, run: Run, mesh: Mesh, chip: Chip) -> Collective | None:
    """What an instruction sends; None for one that is no collective."""
    operands = [array.size_bytes for operand in program.operands_of(run) for array in operand.arrays]
    instruction, attributes = run.instruction, run.instruction.rest
    kind = instruction.opcode.removesuffix("-start")
    fused = [] if kind != "fusion" else _fused_sum(program, instruction)
    if fused:  # of a sum every device takes its part
        kind, attributes = "reduce-scatter", fused[0].rest
    if kind == "recv" and "xla_megascale_runtime" in attributes:
        return _between_slices(run, mesh, chip)
    if kind not in _KINDS:
        return None
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
    result = sum(array.size_bytes for array in arrays)
    group = _group(attributes, kind, mesh.devices.size)
    share = (len(group) - 1) / len(group)
    received = {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter": sum(operands) * share,
        "all-to-all": result * share,
        "ragged-all-to-all": min(*operands[:1], result) * share,  # of the two sides, one has room to spare
        "collective-permute": result,
        "collective-broadcast": result,
    }[kind]
    largest = max(arrays, key=lambda array: array.size_bytes)
    more = f" and {len(arrays) - 1} more" if len(arrays) > 1 else ""
    return Collective(
        kind,
        _axes(group, mesh),
        len(group),
        f"{largest}{more}",
        largest.size,
        received,
        run.times,
        _busy(kind, received, [mesh.devices.flat[number] for number in group], mesh, chip),
        instruction.op_name,
    )


def _between_slices(run: Run, mesh: Mesh, chip: Chip) -> Collective:
    """Of a sum over slices, which hosts exchange for their devices, a device's part."""
    array = run.instruction.arrays[0]
    slices = len({device.slice_index for device in mesh.devices.flat})
    received = 2 * array.size_bytes * (slices - 1) / slices
    busy = {"between slices": received / chip.outer_bandwidth}
    op_name = run.instruction.op_name
    return Collective(
        "all-reduce", ("data",), slices, str(array), array.size, received, run.times, busy, op_name
    )


def _fused_sum(program: Program, fusion: Instruction) -> list[Instruction]:
    called = program.computations[fusion.called("calls")[0]]
    return [inner for inner in called.values() if inner.opcode == "all-reduce"]


def _group(attributes: str, kind: str, devices: int) -> list[int]:
    """The devices, by their number in the mesh, that exchange with the first."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
        return [int(number) for number in pairs.groups()] if pairs else [0, 1]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source = ([int(n) for n in iota.group(place).split(",")] for place in (1, 2))
        numbers = np.arange(devices).reshape(source)
        if iota.group(3):
            numbers = numbers.transpose([int(n) for n in iota.group(3).split(",")])
        return numbers.reshape(shape)[0].tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return [int(number) for number in listed.group(1).split(",")] if listed else list(range(devices))


def _axes(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    return tuple(
        name for name, place in zip(mesh.axis_names, places, strict=True) if len(set(place.tolist())) > 1
    )


def _busy(kind: str, received: float, devices: list[Any], mesh: Mesh, chip: Chip) -> dict[str, float]:
    if len(devices) == 1:
        return {}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if chip.devices_per_node:
        return _through_nodes(kind, received, devices, chip)
    if slices > 1:
        return {"between slices": received / chip.outer_bandwidth}
    return _through_torus(kind, received, devices, mesh, chip)


def _through_nodes(kind: str, received: float, devices: list[Any], chip: Chip) -> dict[str, float]:
    """GPUs of a node have a network of their own; to others each has one card."""
    nodes = [device.id // chip.devices_per_node for device in devices]
    of_node, others = nodes.count(nodes[0]), len(nodes) - nodes.count(nodes[0])
    outside = received * others / max(len(nodes) - 1, 1)
    # What all of a node want from outside comes in once, through all of their cards.
    shared = of_node if kind in ("all-gather", "all-reduce", "reduce-scatter") else 1
    busy = {
        "in a node": received / chip.node_bandwidth,
        "between nodes": outside / shared / chip.outer_bandwidth,
    }
    return {part: seconds for part, seconds in busy.items() if seconds}


def _through_torus(
    kind: str, received: float, devices: list[Any], mesh: Mesh, chip: Chip
) -> dict[str, float]:
    """The links of each dimension in which the chips of the group differ.

    What is gathered or added up goes round rings, of all dimensions at once. What is exchanged piece by piece goes on
    average a quarter of the way round, over links of two directions: an eighth of its dimension a link. Along one that
    does not close, half of all cross its middle in either direction: a quarter.
    """
    places = np.asarray([device.coords for device in devices])
    extents = [len({device.coords[axis] for device in mesh.devices.flat}) for axis in range(places.shape[1])]
    chips = len({tuple(place) for place in places.tolist()})
    if chips == 1:
        return {"in a chip": received / (6 * chip.link_bandwidth)}
    in_pieces = kind in ("all-to-all", "ragged-all-to-all")
    # Devices of a chip share its links: what all of a group are to have comes to a chip once, all else for each.
    received *= chip.devices_per_chip / (1 if in_pieces else len(devices) / chips)
    rings = min(extent for extent in extents if extent > 1) % chip.closes_at == 0
    links, hops = 0.0, {}
    for axis, extent in enumerate(extents):
        distinct = sorted(set(places[:, axis].tolist()))
        if len(distinct) == 1:
            continue
        stride = min(b - a for a, b in itertools.pairwise(distinct))
        closes = rings and len(distinct) * stride == extent and extent % chip.closes_at == 0
        links += (2 if closes else 1) / stride
        hops["xyz"[axis]] = len(distinct) / (8 if closes else 4) * stride
    if in_pieces:
        return {dimension: received * of_it / chip.link_bandwidth for dimension, of_it in hops.items()}
    return dict.fromkeys(hops, received / (links * chip.link_bandwidth))
