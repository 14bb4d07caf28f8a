"""What became of the documents, as ``prepare`` tells it at its end."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsjax.data.manifest import read_manifest

_STEPS = {
    "read": "read",
    "filtered": "passed the filters",
    "without_exact_duplicates": "without exact duplicates",
    "without_near_duplicates": "without near-duplicates",
    "train": "for training",
    "heldout": "held out",
}


def report(folder: Path) -> None:
    """Prints the counts of a prepared set, why documents were rejected, and what to do next."""
    manifest = read_manifest(folder)
    table = Table(box=None, pad_edge=False)
    for column in ("", "documents", "MB", "tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for step, entry in manifest["counts"].items():
        tokens = f"{entry['tokens']:,}" if "tokens" in entry else ""
        table.add_row(_STEPS[step], f"{entry['documents']:,}", f"{entry['bytes'] / 1e6:,.1f}", tokens)
    console = Console()
    console.print(table)
    rejected = sorted(manifest["rejected"].items(), key=lambda item: -item[1])
    if told := ", ".join(f"{count:,} {reason}" for reason, count in rejected if count):
        told += f" (some of each in {folder}/rejects.jsonl)"
        console.print(f"rejected: {told}", markup=False, highlight=False, soft_wrap=True)
    if manifest["tails_held_out"]:
        console.print("held out: the last part of every document, there being none to spare", highlight=False)
    flags = f"--config=configs/tiny.py --workdir=RUN --config.data.sets={shlex.quote(str(folder))}"
    console.print(f"train on it: python train.py {flags}", markup=False, highlight=False, soft_wrap=True)
