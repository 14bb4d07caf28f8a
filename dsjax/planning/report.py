"""A plan in figures: memory, FLOPs, collectives, and the time that follows from a device's limits."""

import collections
import dataclasses
import re
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dsjax.planning.chips import Chip
from dsjax.planning.costs import cost
from dsjax.planning.hlo import Program
from dsjax.planning.memory import Memory
from dsjax.planning.network import Collective, busy_seconds, collective_of

_GIB = 2**30


class Operation(NamedTuple):
    """Instructions from one place in the model's code, over a whole step, on one device."""

    name: str
    flops: float
    bytes: float
    seconds: float  # the longer of what products and what memory take, instruction by instruction


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs of one device."""

    topology: str
    devices: int
    mesh: dict[str, int]
    step: str  # train or decode
    sequences: int
    tokens: int  # of the global batch that take part in it; those of one step of each sequence for decoding
    compile_seconds: float
    memory: Memory
    memory_limit: float
    model_flops: float  # of one device, nothing counted twice for being computed again
    flops: float  # that the program has
    flops_seconds: float
    device_seconds: float  # products and memory, instruction by instruction
    beside_seconds: float  # what a device's other processors do, such as a TPU's sparse cores
    memory_seconds: float  # all bytes of both at the full bandwidth
    network: dict[str, float]  # seconds that each part of it works
    peak_flops: float
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[str, ...]  # whose count depends on data: taken to end at 1
    findings: tuple[
        str, ...
    ]  # what no device should have: all experts, a whole vocabulary, a number for each pair

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.memory.total <= self.memory_limit

    @property
    def network_seconds(self) -> float:
        """Of the part of the network that works longest, all parts working side by side."""
        return max(self.network.values(), default=0.0)

    @property
    def seconds(self) -> float:
        """Of a step at the limits: the device, its other processors, its memory and the network side by side."""
        return max(self.device_seconds, self.beside_seconds, self.memory_seconds, self.network_seconds)

    @property
    def mfu(self) -> float:
        """The model's FLOPs over what the device could do in ``seconds``."""
        return self.model_flops / self.peak_flops / self.seconds

    @property
    def mfu_in_turn(self) -> float:
        """The same where one begins when the other ends, and one message when the other has come."""
        sent = sum(collective.seconds * collective.times for collective in self.collectives)
        seconds = self.device_seconds + self.beside_seconds + sent
        return self.model_flops / self.peak_flops / seconds

    def as_json(self) -> dict[str, Any]:
        """Everything, in bytes and seconds."""
        figures = dataclasses.asdict(self)
        figures["memory"] = self.memory._asdict()
        figures["operations"] = [operation._asdict() for operation in self.operations]
        figures["collectives"] = [collective._asdict() for collective in self.collectives]
        return figures | {
            "fits": self.fits,
            "network_seconds": self.network_seconds,
            "mfu": self.mfu,
            "mfu_in_turn": self.mfu_in_turn,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """For reading."""
        sizes = " ".join(f"{name}={size}" for name, size in self.mesh.items() if size > 1) or "one device"
        memory, peak = self.memory, self.peak_flops
        waiting = self.device_seconds - self.flops_seconds
        more = self.flops - self.model_flops
        parts = ", ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in sorted(self.network.items()))
        found = [
            f"{self.topology}: {self.devices} devices, mesh {sizes}; {self.step} step of {self.sequences:,} sequences, "
            f"{self.tokens:,} tokens; compiled in {self.compile_seconds:.0f} s",
            "",
            "memory of a device, GiB",
            *(f"  {name:<13}{size / _GIB:8.2f}" for name, size in memory._asdict().items() if size),
            f"  {'headroom':<13}{(self.memory_limit - memory.total) / _GIB:8.2f} of {self.memory_limit / _GIB:.1f}",
            "",
            "time of a step on a device at its limits, ms",
            f"  {'model':<24}{self.model_flops / peak * 1e3:10.1f}  {self.model_flops / 1e12:.1f} TFLOP",
            f"  {'computed beside':<24}{more / peak * 1e3:10.1f}  {more / 1e12:.1f} TFLOP: again, masked or padded",
            f"  {'waiting for memory':<24}{waiting * 1e3:10.1f}  longest:",
            *(f"      {o.seconds * 1e3:8.1f} ms {o.bytes / 1e9:8.1f} GB  {o.name}" for o in self._waiting()),
            f"  {'device':<24}{self.device_seconds * 1e3:10.1f}",
            f"  {'sparse cores':<24}{self.beside_seconds * 1e3:10.1f}  beside the device",
            f"  {'memory':<24}{self.memory_seconds * 1e3:10.1f}  all of its traffic, beside products",
            f"  {'network':<24}{self.network_seconds * 1e3:10.1f}  beside the device, at best: {parts}",
            *(f"      {line}" for line in self._sent()),
            "",
            f"MFU {self.mfu:.1%} with all of these side by side, {self.mfu_in_turn:.1%} with one after the other",
        ]  # fmt: skip
        found += [f"brought together or stored: {finding}" for finding in self.findings]
        if self.loops:
            found.append(f"taken to end at 1, as data decides: {', '.join(self.loops)}")
        return found

    def _waiting(self) -> list[Operation]:
        return sorted(self.operations, key=lambda o: o.flops / self.peak_flops - o.seconds)[:6]

    def _sent(self) -> list[str]:
        lines = []
        for collective in self.collectives[:12]:
            seconds = collective.seconds * collective.times
            lines.append(
                f"{seconds * 1e3:8.1f} ms {collective.bytes * collective.times / 1e9:8.1f} GB  {collective.kind} "
                f"{collective.result} over {'·'.join(collective.axes)} ({collective.devices}), {collective.times} times"
            )
        return lines


class Weighed(NamedTuple):
    """A program's operations and messages, the longest first, and the sums."""

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    flops: float
    flops_seconds: float
    device_seconds: float
    beside_seconds: float
    memory_seconds: float
    network: dict[str, float]


def weigh(program: Program, mesh: Mesh, chip: Chip, shares: dict[str, float]) -> Weighed:
    """Costs of a compiled step on one device; ``shares`` as ``computed_shares`` gives them."""
    operations: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    all_flops, all_bytes, busy = 0.0, 0.0, {False: 0.0, True: 0.0}
    collectives = []
    for run in program.runs():
        collective = collective_of(program, run, mesh, chip)
        if collective:
            collectives.append(collective)
            continue
        flops, size = cost(program, run)
        for name, share in shares.items():
            if re.search(name, run.instruction.op_name):
                flops *= share
        seconds = max(flops / chip.flops_per_second, size / chip.memory_bandwidth)
        all_flops += flops * run.times
        all_bytes += size * run.times
        if run.instruction.opcode in ("copy-start", "slice-start"):  # goes on by itself, ahead of its use
            continue
        busy[run.is_beside] += seconds * run.times
        if seconds and not run.is_beside:
            of_place = operations[_place(run.instruction.op_name) or run.instruction.opcode]
            for number, value in enumerate((flops, size, seconds)):
                of_place[number] += value * run.times
    collectives.sort(key=lambda collective: -collective.seconds * collective.times)
    return Weighed(
        tuple(
            sorted((Operation(name, *sums) for name, sums in operations.items()), key=lambda o: -o.seconds)
        ),
        tuple(collectives),
        flops=all_flops,
        flops_seconds=all_flops / chip.flops_per_second,
        device_seconds=busy[False],
        beside_seconds=busy[True],
        memory_seconds=all_bytes / chip.memory_bandwidth,
        network=busy_seconds(collectives),
    )


def _place(op_name: str) -> str:
    """The end of an operation's path, and whether it is of the backward pass or computed again."""
    parts = op_name.split("/")
    way = (
        "recomputed " if "rematted_computation" in op_name else "backward " if "transpose(" in op_name else ""
    )
    kept = [p for p in parts if p not in ("while", "body", "cond", "closed_call", "checkpoint", "shard_map")]
    return way + "/".join(kept[-3:])
