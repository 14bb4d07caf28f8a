"""Kernels compiled for accelerators that this machine does not have: do they fit, and how well are they scheduled?

    pip install 'jax[tpu]' && python benchmarks/compiled_kernels.py v5p

    pip install absl-py  # which jax's Mosaic GPU imports
    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION nvidia-cuda-nvcc-cu12 \\
        nvidia-cuda-runtime-cu12 nvidia-cuda-cupti-cu12 nvidia-cuda-nvrtc-cu12 nvidia-nvjitlink-cu12
    python benchmarks/compiled_kernels.py h100      # VERSION is that of jax; nothing else is needed of CUDA

Everything that a layer of the 671B model runs at 128K tokens, forward and backward, goes through the accelerator's
own compiler. The table says for each TPU kernel how much VMEM it takes, how many instruction bundles its hottest loop
has, and which share of the slots for matrix products, vector arithmetic, loads and stores they fill. Bundles are
counted, not timed: waiting for memory is not in them. For each GPU kernel it says registers a thread, bytes spilt
from them, shared memory, blocks that a multiprocessor holds, and how many instructions for asynchronous products
(wgmma) and asynchronous copies its program has: without them it is slow. Atomic additions that are ordered wait for all
other memory, relaxed ones for none.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
PROGRAMS = ("sparse", "dense", "e4m3", "decode", "decode8", "fp8", "wgrad", "experts")
SLOTS = ("MXU", "VALU", "VLOAD", "VSTORE")


class TpuKernel(NamedTuple):
    """What the compiler made of one kernel."""

    program: str
    kernel: str
    vmem_bytes: int
    bundles: int  # of the hottest loop
    filled: dict[str, float]  # share of its slots

    @staticmethod
    def header() -> str:
        return f"{'VMEM MiB':>9}{'bundles':>9}" + "".join(f"{slot:>8}" for slot in SLOTS)

    def row(self) -> str:
        shares = "".join(f"{self.filled[slot]:8.0%}" for slot in SLOTS)
        return f"{self.vmem_bytes / 2**20:9.1f}{self.bundles:9}{shares}"


class GpuKernel(NamedTuple):
    """What the compiler made of one kernel."""

    program: str
    kernel: str
    registers: int  # a thread
    spilt_bytes: int
    shared_bytes: int
    threads: int
    products: int
    copies: int
    ordered: int  # atomic additions that wait for all other memory
    relaxed: int  # and those that wait for none

    @staticmethod
    def header() -> str:
        counted = f"{'wgmma':>7}{'copies':>8}{'ordered':>9}{'relaxed':>9}"
        return f"{'registers':>10}{'spilt':>7}{'shared KB':>11}{'blocks':>8}{counted}"

    def row(self) -> str:
        used = f"{self.registers:10}{self.spilt_bytes:7}{self.shared_bytes / 1024:11.1f}{self.blocks:8}"
        return f"{used}{self.products:7}{self.copies:8}{self.ordered:9}{self.relaxed:9}"

    @property
    def blocks(self) -> int:
        """How many a multiprocessor of compute capability 9 holds at a time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(65536 // registers, (228 << 10) // (self.shared_bytes + 1024), 2048 // self.threads)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chip", choices=[*TOPOLOGIES, "h100"])
    parser.add_argument("--queries", type=int, default=1024, help="of a block of attention")
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", type=Path, help="a file for the same, one object a kernel")
    arguments = parser.parse_args()
    is_gpu = arguments.chip == "h100"
    kernels = []
    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(
            JAX_PLATFORMS="cpu",
            CUDA_VISIBLE_DEVICES="",
            XLA_FLAGS=f"--xla_dump_to={dump}" if is_gpu else "",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # there is no TPU to share
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE="v5p-8",
            MOSAIC_GPU_DUMP_TO=dump,
            MOSAIC_GPU_DUMP_PTX="1",
            MOSAIC_GPU_DUMP_PTXAS="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        )
        from compiled_programs import programs

        for name, program in programs(arguments.queries, arguments.keys).items():
            if name not in arguments.programs:
                continue
            before = set(Path(dump).iterdir())
            names = compile_for(arguments.chip, program)
            read_dump = read_gpu_dump if is_gpu else read_tpu_dump
            kernels += read_dump(name, names, set(Path(dump).iterdir()) - before)
    print(f"{arguments.chip}: {arguments.queries} queries, {arguments.keys} keys")
    print(f"{'':8}{'kernel':30}{kernels[0].header()}")
    for kernel in kernels:
        print(f"{kernel.program:8}{kernel.kernel:30}{kernel.row()}")
    if arguments.json:
        arguments.json.write_text(json.dumps([kernel._asdict() for kernel in kernels], indent=1))


def compile_for(chip: str, program: Callable[[], Any]) -> tuple[str, ...]:
    """Compiles a program for one chip and returns its kernels' names; jax is imported after the environment is set."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from dsjax.planning.topology import H100

    if chip == "h100":
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        function, arguments, tpu, gpu = program()
        jax.jit(function, in_shardings=whole, out_shardings=whole).lower(*arguments).compile()
    return gpu if chip == "h100" else tpu


def read_tpu_dump(program: str, names: tuple[str, ...], files: set[Path]) -> list[TpuKernel]:
    """The kernels of a program from what the compiler wrote down, by their names within those of transformations."""
    stages = collections.defaultdict(lambda: collections.defaultdict(dict))
    for path in files:
        match = re.match(r"(\d+-(?:jvp_|transpose_|jit_)*(\w+?)_*(?:\.\d+)?)-\d+-(.+)\.txt", path.name)
        if match:
            stages[match[2]][match[1]][match[3]] = path
    kernels = []
    for name in names:
        of_kernel = stages[name][min(stages[name])]  # the first of those that share a name
        bundles = of_kernel["final_bundles"], of_kernel["final_hlo-static-per-bundle-utilization"]
        kernels.append(
            TpuKernel(program, name, vmem_bytes(of_kernel["original"].read_text()), *hottest_loop(*bundles))
        )
    return kernels


def vmem_bytes(original: str) -> int:
    """All that a kernel asks for in vector memory: scratch, and two buffers of every block."""
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", original))


def hottest_loop(bundles: Path, utilization: Path) -> tuple[int, dict[str, float]]:
    """Bundles of the loop with most work at the greatest depth, and the share of each kind of slot they fill."""
    depths = [
        line.split("{")[0].count(">")
        for line in bundles.read_text().splitlines()
        if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line)
    ]
    capacity, rows = {}, []
    lines = iter(utilization.read_text().splitlines())
    for line in lines:
        if line.startswith("MXU,"):
            capacity = dict(zip(line.split(", "), map(int, next(lines).split()), strict=True))
        elif capacity and re.match(r"\d", line):
            rows.append(dict(zip(capacity, map(int, line.split()), strict=True)))
    regions = []
    for depth, row in zip(depths, rows, strict=True):
        if not regions or regions[-1][0] != depth:
            regions.append((depth, []))
        regions[-1][1].append(row)
    work = max((rows for _, rows in regions), key=lambda rows: sum(r["MXU"] * 1000 + r["VALU"] for r in rows))
    return len(work), {slot: sum(r[slot] for r in work) / capacity[slot] / len(work) for slot in SLOTS}


def read_gpu_dump(program: str, names: tuple[str, ...], files: set[Path]) -> list[GpuKernel]:
    """The kernels of a program: registers from the assembler, shared memory from the launches."""
    import nvidia.cuda_nvcc

    assembler = Path(next(iter(nvidia.cuda_nvcc.__path__))) / "bin" / "ptxas"
    used, shared, instructions = {}, {}, {}
    for path in files:
        if path.suffix == ".ptx":
            command = [assembler, "-arch=sm_90a", "-v", path, "-o", os.devnull]
            # A program without kernels of its own is no assembly: those that count must all be found.
            used |= read_assembler_log(subprocess.run(command, capture_output=True, text=True).stderr)
            instructions |= read_assembly(path.read_text())
        elif path.suffix == ".ptxas":  # of Mosaic GPU, which assembles by itself
            used |= read_assembler_log(path.read_text())
        elif "thunk_sequence" in path.name:
            for name, size in re.findall(r"\] (\w+) grid: .*shared_memory: (\d+) bytes", path.read_text()):
                shared[name] = int(size)
        elif path.name.endswith(".mlir-passes.log"):  # of Mosaic GPU too
            size = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", path.read_text())
            if size:
                shared[re.sub(r"_\d+\.mlir.*", "", path.name)] = int(size[1])
    missing = [name for name in names if not (name in used and name in shared and name in instructions)]
    if missing:  # from jax 0.11 on the compiler keeps the assembly of Triton kernels to itself
        import jax

        sys.exit(
            f"jax {jax.__version__} compiled {', '.join(missing)} and wrote no assembly of it: take jax 0.10"
        )
    return [GpuKernel(program, name, *used[name], shared[name], *instructions[name]) for name in names]


def read_assembler_log(text: str) -> dict[str, tuple[int, int]]:
    """Of each kernel: registers and spilt bytes."""
    pattern = (
        r"properties for (\w+)\n.*?, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) reg"
    )
    found = re.findall(pattern, text)
    return {
        own_name(name): (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found
    }


def own_name(name: str) -> str:
    """A kernel's name without what Mosaic GPU adds to it."""
    return name.removesuffix("_mosaic_gpu_kernel")


def read_assembly(text: str) -> dict[str, tuple[int, ...]]:
    """Of each kernel: threads of a block, asynchronous products and copies, ordered and relaxed atomic additions."""
    entries = re.findall(
        r"\.entry (\w+)\(.*?\.(?:reqntid|maxntid) (\d+)(.*?)(?=\.entry |\Z)", text, re.DOTALL
    )
    return {
        own_name(name): (
            int(threads),
            body.count("wgmma.mma_async"),
            len(re.findall(r"cp\.async\.(?:c[ag]|bulk\.tensor\.\dd\.shared)", body)),
            len(re.findall(r"(?:atom|red)\.\S*acq_rel", body)),
            len(re.findall(r"(?:atom|red)\.\S*relaxed", body)),
        )
        for name, threads, body in entries
    }


if __name__ == "__main__":
    main()
