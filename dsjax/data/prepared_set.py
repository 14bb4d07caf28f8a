"""A prepared set, opened: what training and evaluation read."""

import dataclasses
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError
from dsjax.data.files import hash_of_files
from dsjax.data.manifest import read_manifest
from dsjax.data.token_set import TokenSet
from dsjax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A tokenizer, the tokens of the training and of the held-out documents, and the account of their making."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenSet
    heldout: TokenSet
    manifest: dict[str, Any]


def open_set(folder: Path) -> PreparedSet:
    """Opens what ``python -m dsjax.data.prepare`` or a run wrote.

    Errors: ConfigError where there is no such set, or one that is damaged.
    """
    manifest = read_manifest(folder)
    try:
        definition = (folder / "tokenizer.json").read_bytes().decode("utf-8")
        if hash_of_files([folder / "tokenizer.json"]) != manifest["tokenizer"]["blake2b"]:
            raise ValueError("tokenizer.json is not the one it was made with")
        train, heldout = (_token_set(folder, manifest, side) for side in ("train", "heldout"))
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is damaged ({error}): delete it and prepare it again") from error
    tokenizer = Tokenizer(definition, source=str(folder / "tokenizer.json"))
    return PreparedSet(folder, tokenizer, train, heldout, manifest)


def _token_set(folder: Path, manifest: dict[str, Any], side: str) -> TokenSet:
    found = TokenSet(folder, [shard["name"] for shard in manifest["shards"][side]])
    tokens, wanted = int(found.lengths.sum()), manifest["counts"][side]["tokens"]
    if tokens != wanted:
        raise ValueError(f"{tokens} {side} tokens instead of {wanted}")
    return found
