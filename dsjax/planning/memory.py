"""What lies in a device's memory while a compiled step runs."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from dsjax.planning.hlo import Instruction, Program


class Memory(NamedTuple):
    """Bytes of one device. What the compiler adds to parameters and optimizer is divided by where it is written."""

    parameters: int
    optimizer: int
    cache: int  # of keys, for decoding
    activations: int  # kept by loops of layers from the forward to the backward pass
    gradients: int  # that loops of layers collect
    temporaries: int  # the rest
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def memory_of(compiled: Any, program: Program, *, model: Any, optimizer: Any = (), cache: Any = ()) -> Memory:
    """Of a compiled step, its program and what it takes, in abstract arrays that say where they lie."""
    analysis = compiled.memory_analysis()
    parts = shard_bytes(model), shard_bytes(optimizer), shard_bytes(cache)
    activations, gradients = _kept_by_loops(program)
    temporary = analysis.temp_size_in_bytes
    activations = min(activations, temporary)
    gradients = min(gradients, temporary - activations)
    others = analysis.argument_size_in_bytes - sum(parts)
    unaliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    rest = temporary - activations - gradients + max(others, 0) + max(unaliased, 0)
    return Memory(*parts, activations, gradients, rest, analysis.generated_code_size_in_bytes)


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of abstract arrays."""

    def size(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
        return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def _kept_by_loops(program: Program) -> tuple[int, int]:
    """Bytes of what loops over layers write a row an iteration: on the way forward, and back."""
    kept = {False: 0, True: 0}
    for loop in (i for computation in program.computations.values() for i in computation.values()):
        if loop.opcode == "while" and re.search(r"jvp\(\)\)?/while$", loop.op_name):
            body = program.computations[loop.called("body")[0]]
            root = program.root(loop.called("body")[0])
            backward = "transpose(" in loop.op_name
            for place, name in enumerate(root.operands):
                if place < len(loop.arrays) and _is_written_in_rows(program, body, body[name]):
                    kept[backward] += loop.arrays[place].size_bytes
    return kept[False], kept[True]


def _is_written_in_rows(program: Program, body: dict[str, Instruction], value: Instruction) -> bool:
    if value.opcode == "get-tuple-element":
        value = body.get(value.operands[0], value)
    if value.opcode == "dynamic-update-slice":
        return True
    if value.opcode != "fusion":
        return False
    return any(
        i.opcode == "dynamic-update-slice" for i in program.computations[value.called("calls")[0]].values()
    )


def temporaries_of(error: str) -> int | None:
    """Bytes of a program's temporaries, from the compiler's complaint that they do not fit; None if it says no such."""
    found = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM", error)
    return int(float(found.group(1)) * 1024 ** (1 + "KMG".index(found.group(2)))) if found else None
