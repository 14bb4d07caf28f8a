"""``python -m dsjax.parallel.plan``: a step compiled for devices that are not here, and what it would need of them."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dsjax.config import ConfigError, RunConfig
from dsjax.config.config_file import choices, load_file
from dsjax.config.overrides import apply
from dsjax.observe.model_flops import decode_flops_per_token, train_flops_per_token
from dsjax.parallel.mesh import build_mesh, check_fits
from dsjax.planning.chips import Chip
from dsjax.planning.decoding import abstract_decoding, lowered_decode
from dsjax.planning.findings import brought_together, of_pairs
from dsjax.planning.hlo import Program
from dsjax.planning.memory import memory_of, shard_bytes, temporaries_of
from dsjax.planning.report import Plan, weigh
from dsjax.planning.shares import computed_shares
from dsjax.planning.topology import devices_of
from dsjax.train.state import abstract_state
from dsjax.train.step import lowered_step

_GIB = 2**30


class DoesNotFit(Exception):  # noqa: N818 (an answer)
    """Memory does not suffice; the message says for what."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan; exits 1 where the step does not fit, 2 where the command line is wrong."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        for flag in ("json", "hlo"):
            _refuse_unwritable(flag, getattr(arguments, flag))
        plan, text = planned(_config(arguments.config, rest), arguments.topology, arguments.step)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except DoesNotFit as answer:
        sys.stdout.write(f"{answer}\n")
        sys.exit(1)
    sys.stdout.write("\n".join(plan.lines()) + "\n")
    if arguments.hlo:
        Path(arguments.hlo).write_text(text)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(plan.as_json(), indent=1) + "\n")
    if not plan.fits:
        sys.stdout.write(_answer(plan.memory._asdict(), plan.memory_limit) + "\n")
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsjax.parallel.plan",
        description="Compiles the train step of a configuration for devices that need not be here, and prints what it "
        "needs of each: memory, FLOPs, messages, and the time that follows from the devices' limits. Nothing runs.",
        epilog="Further flags are fields of the configuration, as those of train.py: --config.mesh.expert=64.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="as of train.py")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5p:8x8x8, v6e:16x16, tpu7x:4x8x8; 2*v5p:8x8x8 for two slices; h100:64 for 8 nodes",
    )
    parser.add_argument(
        "--step",
        choices=list(STEPS),
        default="train",
        help="decode is one token for each of train.batch_size sequences of train.sequence_length (default: train)",
    )
    parser.add_argument("--json", metavar="FILE", help="everything, in bytes and seconds")
    parser.add_argument("--hlo", metavar="FILE", help="the compiled program, as XLA prints it")
    return parser


def _refuse_unwritable(flag: str, path: str | None) -> None:
    if path and not (Path(path).parent.is_dir() and os.access(Path(path).parent, os.W_OK)):
        raise ConfigError(
            f"--{flag}={path}: there is no folder {Path(path).parent} that may be written to: make it"
        )


def _config(path: str, rest: list[str]) -> RunConfig:
    config, left = apply(load_file(path), rest)
    if left:
        raise ConfigError(
            f"{left[0]!r} belongs to no flag: fields are written --config.FIELD=VALUE; {choices()}"
        )
    config.check()
    return config.freeze()


class Step(NamedTuple):
    """A program that has been lowered for a mesh, and what a plan says of it beside its costs."""

    lowered: jax.stages.Lowered
    state: dict[str, Any]  # model, and optimizer or cache
    tokens: int  # of all devices
    model_flops: float  # of all devices


def train_step(config: RunConfig, mesh: Mesh) -> Step:
    """Of the configuration."""
    train, state = config.train, abstract_state(config, mesh)
    tokens = train.batch_size * train.sequence_length
    flops = train_flops_per_token(config.model, train.sequence_length) * tokens
    held = {"model": state.model, "optimizer": state.optimizer}
    return Step(lowered_step(config, mesh), held, tokens, flops)


def decode_step(config: RunConfig, mesh: Mesh) -> Step:
    """One token for each of ``train.batch_size`` sequences of ``train.sequence_length`` tokens."""
    sequences, length = config.train.batch_size, config.train.sequence_length
    state = abstract_decoding(config.model, mesh, sequences, length)
    flops = decode_flops_per_token(config.model, length) * sequences
    return Step(lowered_decode(state, mesh, sequences), state._asdict(), sequences, flops)


STEPS = {"train": train_step, "decode": decode_step}


def planned(config: RunConfig, topology: str, step: str = "train") -> tuple[Plan, str]:
    """The plan of a step, of ``STEPS``, and the text of the compiled program.

    Raises ConfigError for a mesh that does not fit the devices, and DoesNotFit where the compiler found no place for
    its arrays.
    """
    devices, chip = devices_of(topology)
    check_fits(config, len(devices))
    shares = computed_shares(config, chip, step)
    mesh, model, train = build_mesh(config.mesh, devices), config.model, config.train
    start = time.perf_counter()
    lowered, state, tokens, model_flops = STEPS[step](config, mesh)
    held = {name.replace("model", "parameters"): shard_bytes(tree) for name, tree in state.items()}
    compiled = _compiled(lowered, held, chip)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    program = Program(text)
    weighed = weigh(program, mesh, chip, shares)
    tokens_here = tokens // train.accumulation_steps // len(devices)
    findings = brought_together(weighed.collectives, model)
    if step == "train":
        findings += of_pairs(program, model, train.sequence_length, tokens_here)
    plan = Plan(
        topology=topology,
        devices=len(devices),
        mesh=dict(mesh.shape),
        step=step,
        sequences=train.batch_size,
        tokens=tokens,
        compile_seconds=seconds,
        memory=memory_of(compiled, program, **state),
        memory_limit=chip.memory_bytes,
        model_flops=model_flops / len(devices),
        peak_flops=chip.flops_per_second,
        loops=tuple(sorted(program.unknown_loops)),
        findings=findings,
        **weighed._asdict(),
    )
    return plan, text


def _compiled(lowered: jax.stages.Lowered, held: dict[str, int], chip: Chip) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        temporaries = temporaries_of(text)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        if temporaries is None:
            raise ConfigError(f"the compiler refuses the step: {' '.join(text.split())[:400]}") from error
        parts = {**held, "temporaries": temporaries}
        sizes = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())
        raise DoesNotFit(_answer(parts, chip.memory_bytes) + f" ({sizes})") from error


def _answer(parts: dict[str, int], limit: float) -> str:
    total, largest = sum(parts.values()), max(parts, key=parts.__getitem__)
    return f"does not fit: {total / _GIB:.0f} of {limit / _GIB:.0f} GiB, largest: {largest}"
