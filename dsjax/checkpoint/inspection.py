"""What ``convert inspect`` prints: a checkpoint by kind of tensor, and everything that is wrong with it."""

import collections
import dataclasses
import math

from rich.console import Console
from rich.table import Table

from dsjax.checkpoint.hf_checkpoint import HfCheckpoint, problems
from dsjax.checkpoint.hf_names import CheckpointTensor

# The first part that a tensor's path holds names its family.
_FAMILIES = {
    "indexer": "lightning indexer",
    "self_attn": "attention",
    "mlp.experts": "routed experts",
    "mlp.shared_experts": "shared experts",
    "mlp.gate.": "router",
    "mlp": "dense MLP",
    "norm": "norms",
    "eh_proj": "MTP projection",
    "embed_tokens": "embedding",
    "lm_head": "head",
}


@dataclasses.dataclass
class _Row:
    tensors: int = 0
    elements: int = 0
    size_bytes: int = 0

    def add(self, other: "_Row") -> None:
        self.tensors += other.tensors
        self.elements += other.elements
        self.size_bytes += other.size_bytes


def report(checkpoint: HfCheckpoint, console: Console) -> bool:
    """Prints the table and every problem; whether there is none."""
    console.print(_table(checkpoint))
    if checkpoint.lacks_mtp:
        console.print(
            "config.json promises multi-token prediction and no file holds any: read as a model without it",
            soft_wrap=True,
        )
    found = list(problems(checkpoint))
    for problem in found:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    verdict = f"{len(found):,} problems" if found else "nothing missing, unexpected, mis-shaped or mis-typed"
    console.print(f"{checkpoint.directory}: {verdict}", markup=False, highlight=False, soft_wrap=True)
    return not found


def _table(checkpoint: HfCheckpoint) -> Table:
    expected = {tensor.name: tensor for tensor in checkpoint.expected()}
    rows: dict[tuple[str, str], _Row] = collections.defaultdict(_Row)
    total = _Row()
    for name, stored in checkpoint.stored.items():
        row = _Row(1, math.prod(stored.shape), stored.size)
        tensor = expected.get(name)
        dtype = f"{stored.dtype} scales" if tensor and tensor.scale_of else stored.dtype
        rows[_family(tensor), dtype].add(row)
        total.add(row)
    kind = checkpoint.config.values["model_type"]
    table = Table(title=f"{kind}, {len({s.file for s in checkpoint.stored.values()}):,} files")
    for heading in ("family", "dtype"):
        table.add_column(heading)
    for heading in ("tensors", "elements", "bytes"):
        table.add_column(heading, justify="right")
    for (family, dtype), row in sorted(rows.items()):
        table.add_row(family, dtype, *(f"{value:,}" for value in dataclasses.astuple(row)))
    table.add_section()
    table.add_row("all", "", *(f"{value:,}" for value in dataclasses.astuple(total)))
    return table


def _family(tensor: CheckpointTensor | None) -> str:
    if tensor is None:
        return "not part of the model"
    family = next(family for part, family in _FAMILIES.items() if part in tensor.path)
    in_mtp = "MTP: " if tensor.path.startswith("mtp.") and family != "MTP projection" else ""
    return f"{in_mtp}{family}{' (copy)' if tensor.copy_of else ''}"
