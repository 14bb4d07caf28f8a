"""FLOPs and memory traffic of a compiled program, instruction by instruction."""

import math
import re
from typing import NamedTuple

import numpy as np

from dsjax.planning.hlo import Array, Instruction, Program, Run

# Results that are other names for what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    "replica-id",
    "after-all",
}
_FREE |= {"iota", "opt-barrier", "send", "recv"}
_ENDS = ("-done", "-update")  # of what is counted where it starts


class Cost(NamedTuple):
    """Of one execution."""

    flops: float
    bytes: float


def cost(program: Program, run: Run) -> Cost:
    """What an instruction of ``program.runs()`` multiplies and moves through the device's main memory."""
    instruction = run.instruction
    if instruction.opcode in _FREE or instruction.opcode.endswith(_ENDS):
        return Cost(0, 0)
    if instruction.opcode == "custom-call" and '"AllocateBuffer"' in instruction.rest:
        return Cost(0, 0)
    return Cost(_flops(program, instruction, run.computation), _traffic(program, run))


def _flops(program: Program, instruction: Instruction, computation: str) -> float:
    """Of products, alone: what else is computed is little beside them, or waits for memory."""
    own = program.computations[computation]
    match instruction.opcode:
        case "dot":
            return _dot_flops(instruction, own[instruction.operands[0]].arrays[0])
        case "convolution":
            left, right = (own[name].arrays[0] for name in instruction.operands[:2])
            return _convolution_flops(instruction, left, right)
        case "custom-call":
            return _kernel_flops(
                instruction, [own[name].arrays[0] for name in instruction.operands if name in own]
            )
        case "fusion":
            called = instruction.called("calls")[0]
            return sum(_flops(program, inner, called) for inner in program.computations[called].values())
    return 0.0


def _dot_flops(instruction: Instruction, left: Array) -> float:
    contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
    return 2.0 * instruction.arrays[0].size * math.prod(left.shape[place] for place in contracted)


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """Two for each pair that meets: TPUs write products of batches as convolutions with dilation."""
    labels = instruction.attribute("dim_labels") or ""
    of_left, of_right, of_out = re.split("_|->", labels)
    out = instruction.arrays[0]
    window = instruction.attribute("window") or ""

    def of_window(name: str, default: int) -> list[int]:
        found = re.search(rf"\b{name}=([\d_x\-]+)", window)
        count = sum(character.isdigit() for character in of_out)
        return [int(part.split("_")[0]) for part in found.group(1).split("x")] if found else [default] * count

    places = sorted(character for character in of_out if character.isdigit())
    meetings = 1.0
    for number, place in enumerate(places):
        meetings *= _meetings(
            left.shape[of_left.index(place)],
            out.shape[of_out.index(place)],
            of_window("size", 1)[number],
            of_window("stride", 1)[number],
            of_window("pad", 0)[number],
            of_window("lhs_dilate", 1)[number],
            of_window("rhs_dilate", 1)[number],
        )
    groups = int(instruction.attribute("batch_group_count") or 1)
    batch, features = out.shape[of_out.index("b")], out.shape[of_out.index("f")]
    return 2.0 * batch * features * right.shape[of_right.index("i")] * meetings / max(groups, 1)


def _meetings(
    left: int, out: int, size: int, stride: int, pad: int, left_dilate: int, right_dilate: int
) -> int:
    """Along one axis, the pairs of an output and a place in the window below which there is an input."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(size)[None] * right_dilate
    return int(np.sum((at % left_dilate == 0) & (at >= 0) & (at // left_dilate < left)))


def _kernel_flops(instruction: Instruction, operands: list[Array]) -> float:
    """What a Pallas kernel says of itself, and the products of GPU libraries."""
    said = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.rest) or re.search(
        r'flops_estimate\\?":\\?"?(\d+)', instruction.rest
    )
    if said:
        return float(said.group(1))
    in_name = re.search(r"/flops=(\d+)/", instruction.op_name)  # of a kernel for GPUs (pallas_kernels.triton)
    if in_name:
        return float(in_name.group(1))
    if "cublas" in instruction.rest:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        places = [int(text.strip('"')) for text in contracted.group(1).split(",")] if contracted else []
        return 2.0 * instruction.arrays[0].size * math.prod(operands[0].shape[place] for place in places)
    return 0.0


def _traffic(program: Program, run: Run) -> float:
    """Bytes read and written, of a slice or an update of an array those alone."""
    instruction = run.instruction
    operands = program.operands_of(run)
    if instruction.opcode == "fusion":
        return _fusion_traffic(program, instruction, operands)
    written = sum(_in_memory(array) for array in instruction.arrays)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * sum(_in_memory(array) for array in operands[1].arrays)
    if instruction.opcode in ("copy-start", "slice-start"):  # the result lists source and target
        return sum(_in_memory(array) for array in instruction.arrays[:2])
    if instruction.opcode.endswith("-start"):  # of a collective, counted as network
        return 0.0
    return written + sum(_in_memory(array) for operand in operands for array in operand.arrays)


def _fusion_traffic(program: Program, fusion: Instruction, operands: list[Instruction]) -> float:
    called = program.computations[fusion.called("calls")[0]]
    total = 0.0
    for inner in called.values():
        if inner.opcode != "parameter" or int(inner.literal) >= len(operands):
            continue
        whole = sum(_in_memory(array) for array in operands[int(inner.literal)].arrays)
        total += min(whole, _read_of(called, inner)) if whole else 0.0
    root = program.root(fusion.called("calls")[0])
    roots = [called[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for array, written in zip(fusion.arrays, roots, strict=False):
        updated = _behind(called, written)
        if updated.opcode == "dynamic-update-slice":
            total += sum(array.size_bytes for array in called[updated.operands[1]].arrays)
        else:
            total += _in_memory(array)
    return total


def _read_of(called: dict[str, Instruction], parameter: Instruction) -> float:
    """Bytes of a parameter that are read: slices of it where only those are used, none where it is only updated."""
    total, names = 0.0, {parameter.name}
    for inner in called.values():
        if not names & set(inner.operands):
            continue
        if inner.opcode in ("bitcast", "reshape") or _is_renaming(inner, parameter):
            names.add(inner.name)
        elif inner.opcode in ("dynamic-slice", "slice", "gather") and inner.operands[0] in names:
            total += inner.arrays[0].size_bytes
        elif inner.opcode == "dynamic-update-slice" and inner.operands[0] in names:
            total += 0.0
        else:
            return math.inf
    return total


def _is_renaming(inner: Instruction, parameter: Instruction) -> bool:
    """Newer TPUs' compilers wrap parameters of fusions in fusions that do nothing."""
    return (
        inner.opcode == "fusion"
        and len(inner.operands) == 1
        and inner.arrays[0].shape == parameter.arrays[0].shape
    )


def _behind(called: dict[str, Instruction], instruction: Instruction) -> Instruction:
    while (
        instruction.opcode in ("bitcast", "reshape", "copy", "convert") and instruction.operands[0] in called
    ):
        instruction = called[instruction.operands[0]]
    return instruction


def _in_memory(array: Array) -> float:
    return float(array.size_bytes) if array.space == 0 else 0.0


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]
