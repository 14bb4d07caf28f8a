"""What decides the content of a prepared set, and what the user calls it."""

import dataclasses
from typing import Literal

Quality = Literal["auto", "prose", "code", "none"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what a prepared set holds, but the files and the tokenizer themselves."""

    inputs: tuple[str, ...] = ()  # files, folders, globs; none: the library sources of the running Python
    text_field: str = "text"  # of JSON lines and parquet
    max_document_bytes: int = 16 << 20
    quality: Quality = "auto"
    keep_near_duplicates: bool = False
    heldout_fraction: float = 0.02  # of the documents, by a hash of their text
    tokenizer: str = ""  # a tokenizer.json; "": one is trained
    vocab_size: int = 0  # of one that is trained; of the model, which a given one must fit; 0: any
    seed: int = 0  # of the held-out documents and of the sample that a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Names:
    """What the user calls the settings."""

    prefix: str = "--"
    inputs: str = "--input"
    vocab_size: str = "--vocab-size"

    def of(self, field: str) -> str:
        """The name of a field of ``Settings``."""
        if field in ("inputs", "vocab_size"):
            return getattr(self, field)
        return self.prefix + (field.replace("_", "-") if self.prefix == "--" else field)
