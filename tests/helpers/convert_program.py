"""``python -m dsjax.checkpoint.convert``, run by tests, and what they look at."""

import json
import sys
from pathlib import Path

from dsjax.checkpoint import convert

REPOSITORY = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
MATRIX = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"


def run(monkeypatch, *arguments) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    try:
        convert.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "dsjax.checkpoint.convert", *map(str, arguments)]


def file_of(hf: Path, name: str) -> Path:
    return hf / json.loads((hf / INDEX).read_text())["weight_map"][name]


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those in which orbax keeps the time."""
    timed = ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }
