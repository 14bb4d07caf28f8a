"""A compiled program as XLA prints it: its instructions, and how often each runs."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Array(NamedTuple):
    """One array of a value. ``space`` 0 is the device's main memory; others are on the chip, or the host's."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    def __str__(self) -> str:
        """As XLA writes it."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes, without what tiles add."""
        return self.size * _bits(self.dtype) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result
    operands: tuple[str, ...]
    rest: str  # attributes, as they are printed
    literal: str  # what stands in the brackets of a constant or a parameter
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of ``name=...``, up to the comma or the matching brace."""
        found = re.search(rf"\b{name}=", self.rest)
        return None if found is None else _upto(self.rest, found.end())

    def called(self, name: str) -> list[str]:
        """Computations of an attribute such as ``calls=%a`` or ``branch_computations={%a, %b}``."""
        return re.findall(r"%([\w.\-]+)", self.attribute(name) or "")

    @property
    def op_name(self) -> str:
        """Where in the model's code it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


class Run(NamedTuple):
    """An instruction that is executed, and how often in one call of the program."""

    instruction: Instruction
    computation: str
    times: int
    is_beside: bool = (
        False  # by a processor of its own, such as a TPU's sparse cores, while the device does other work
    )


class Program:
    """The computations of a module by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()  # whose count depends on data: they end at 1, it is assumed
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if _INSTRUCTION.match(line):
                instruction = _parsed(line)
                current[instruction.name] = instruction
            elif (head := _COMPUTATION.match(line)) and line.rstrip().endswith("{"):
                current = self.computations[head.group(2)] = {}
                if head.group(1):
                    self.entry = head.group(2)

    def runs(self) -> Iterator[Run]:
        """Every instruction that is executed by itself: fusions, not what is fused in them."""
        yield from self._runs(self.entry, 1, is_beside=False)

    def _runs(self, computation: str, times: int, *, is_beside: bool) -> Iterator[Run]:
        for instruction in self.computations[computation].values():
            match instruction.opcode:
                case "while":
                    often = times * self._trips(computation, instruction)
                    yield from self._runs(instruction.called("body")[0], often, is_beside=is_beside)
                case "conditional":
                    branches = instruction.called("branch_computations") or [
                        name for of in ("true", "false") for name in instruction.called(f"{of}_computation")
                    ]
                    yield from self._runs(self._longest(branches), times, is_beside=is_beside)
                case "call" | "call-start" | "async-start":
                    called = instruction.called("to_apply") or instruction.called("calls")
                    away = is_beside or instruction.attribute("async_execution_thread") is not None
                    yield from self._runs(called[0], times, is_beside=away)
                case _:
                    yield Run(instruction, computation, times, is_beside)

    def _longest(self, branches: list[str]) -> str:
        return max(branches, key=lambda name: len(self.computations[name]))

    def operands_of(self, run: Run) -> list[Instruction]:
        """The instructions whose results it reads."""
        own = self.computations[run.computation]
        return [own[name] for name in run.instruction.operands if name in own]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next(i for i in self.computations[computation].values() if i.is_root)

    def _trips(self, computation: str, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.called("condition")[0]]
        root = self.root(loop.called("condition")[0])
        sides = [condition.get(name) for name in root.operands]
        if root.opcode == "fusion":  # on GPUs: of the comparison alone
            root = self.root(root.called("calls")[0])
        counter, end = sides if len(sides) == 2 else (None, None)
        is_counter = root.attribute("direction") == "LT" and counter and counter.opcode == "get-tuple-element"
        place = int(counter.attribute("index") or 0) if counter and is_counter else None
        first = 0 if place is None else self._initial(computation, loop, place)
        if place is not None and end and end.opcode == "constant":
            return max(0, int(end.literal) - first)
        self.unknown_loops.add(loop.op_name or loop.name)
        return max(0, 1 - first)

    def _initial(self, computation: str, loop: Instruction, place: int) -> int:
        """The counter's first value; 0 where it is not a number that is printed."""
        own = self.computations[computation]
        start = own.get(loop.operands[0])
        while start is not None and start.opcode in ("tuple", "copy", "bitcast"):
            start = own.get(start.operands[place if start.opcode == "tuple" else 0])
        literal = start.literal if start is not None and start.opcode == "constant" else ""
        return int(literal) if re.fullmatch(r"-?\d+", literal) else 0


def _parsed(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    assert head is not None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    shape, at = line[at:end], end + 1
    bracket = line.index("(", at)
    last = _closing(line, bracket)
    inside = line[bracket + 1 : last]
    return Instruction(
        name=head.group(2),
        opcode=line[at:bracket],
        arrays=_arrays(shape),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        rest=line[last + 1 :],
        literal=inside,
        is_root=bool(head.group(1)),
    )


def _closing(text: str, at: int) -> int:
    """Where the bracket that opens at ``at`` is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text[at:]):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return at + place.start()
    raise ValueError(f"no closing bracket: {text[:200]}")


def _upto(text: str, at: int) -> str:
    """From ``at`` to the comma that ends an attribute, braces and brackets whole."""
    depth, place = 0, at
    while place < len(text):
        character = text[place]
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            break
        place += 1
    return text[at:place].strip()


@functools.lru_cache(maxsize=1 << 16)
def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        shape_of = tuple(int(size) for size in sizes.split(",") if size)
        found.append(Array(dtype, shape_of, int(space.group(1)) if space else 0))
    return tuple(found)


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) * (2 if dtype.startswith("c") else 1) if digits else 8
