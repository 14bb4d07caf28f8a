"""Last stage: the account of a prepared set, ``manifest.json``, whose presence says that the set is whole."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError
from dsjax.data.cleaning import SAMPLES, Cleaned, not_damaged
from dsjax.data.files import hash_of_files, write_json
from dsjax.data.plan import MADE_BY, Plan
from dsjax.data.selection import load_sides
from dsjax.data.tokenising import SIDES

_FIELDS = {"config", "counts", "rejected", "shards", "tokenizer", "fingerprint"}


def finish(plan: Plan) -> None:
    """Writes ``rejects.jsonl`` and ``manifest.json`` and removes ``work/``.

    ``config``: the settings. ``counts``: documents and bytes after each step, tokens of both sides. ``tails_held_out``:
    whether every document gave its last part instead of some being held out. ``rejected``: how many for each reason.
    ``shards``: what is in each, with blake2b of its files. ``fingerprint``: of everything that training sees, tokenizer
    and shards.
    """
    cleaned = [Cleaned(plan, task).account for task in range(len(plan.tasks))]
    selected = _account(plan.work / "sides.json")
    tokens = [_account(plan.work / f"tokens-{task:05}.json") for task in range(len(plan.tasks))]
    counts = {step: _sum(account["counts"][step] for account in cleaned) for step in ("read", "filtered")}
    counts |= selected["counts"] | {side: _sum(account[side] for account in tokens) for side in SIDES}
    rejected, samples = Counter(reject.reason for reject in plan.rejects), list(plan.rejects)
    for account in (*cleaned, selected):
        rejected.update(account["reasons"])
        samples += account["samples"]
    tokenizer = {"blake2b": hash_of_files([plan.folder / "tokenizer.json"])}
    shards = {side: [account[side] for account in tokens] for side in SIDES}
    hashes = [tokenizer["blake2b"], *(shard["blake2b"] for side in SIDES for shard in shards[side])]
    _write_samples(plan.folder, samples)
    manifest = {
        "made_by": MADE_BY,
        "config": vars(plan.settings),
        "counts": counts,
        "tails_held_out": load_sides(plan).cut_tails,
        "rejected": dict(sorted(rejected.items())),
        "tokenizer": tokenizer,
        "fingerprint": hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest(),
        "shards": shards,
    }
    write_json(plan.folder / "manifest.json", manifest)
    shutil.rmtree(plan.work)


def _account(path: Path) -> Any:
    with not_damaged(path):
        return json.loads(path.read_bytes())


def _sum(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for entry in counts:
        for name in ("documents", "bytes", "tokens"):
            if name in entry:
                total[name] += entry[name]
    return dict(total)


def _write_samples(folder: Path, samples: list[Any]) -> None:
    kept: Counter[str] = Counter()
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as file:
        for name, reason, sample in samples:
            kept[reason] += 1
            if kept[reason] <= SAMPLES:
                file.write(json.dumps({"reason": reason, "name": name, "sample": sample}) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``finish`` wrote. Errors: ConfigError where there is none, or something else."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["made_by"] != MADE_BY:
            raise ValueError(f"it was made by {manifest['made_by']}")
        if missing := _FIELDS - manifest.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'manifest.json'} is not that of a prepared set ({error!r}): make one with "
            "python -m dsjax.data.prepare, or name another folder"
        ) from error
    return manifest
