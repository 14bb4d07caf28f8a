"""Text to token ids and back: a byte-level BPE with DeepSeek's control tokens, trained here or loaded."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsjax.config import ConfigError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"

# Ids 0, 1, … of a tokenizer trained here; the checkpoint's has the first three there. Source: tokenizer.json.
CONTROL_TOKENS = (
    *(BOS, EOS, PAD),
    *("<think>", "</think>"),
    *("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"),
    *("<｜User｜>", "<｜Assistant｜>"),
)

# Pieces that no merge crosses: numbers of at most three digits, runs of Chinese and Japanese, words of other
# scripts with one leading blank or sign, runs of signs with their line break, line breaks, and blanks up to
# the one before a word.
_EAST_ASIAN = r"\p{Han}\p{Hiragana}\p{Katakana}"
_PIECES = "|".join(
    (
        r"\p{N}{1,3}",
        rf"[{_EAST_ASIAN}]+",
        rf"[^\r\n\p{{L}}\p{{M}}\p{{N}}]?[\p{{L}}\p{{M}}&&[^{_EAST_ASIAN}]]+",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# At least one character for every byte that can begin or continue a character in UTF-8.
_CODE_POINTS = (range(0x800), range(0x800, 0xD800, 0x800), range(0xE000, 0x10000, 0x800))
_EVERY_BYTE = "".join(chr(c) for points in (*_CODE_POINTS, range(0x10000, 0x110000, 0x8000)) for c in points)


class Tokenizer:
    """A byte-level BPE over ``tokenizers``: any text round-trips, and no text becomes a control token.

    Fields: ``vocab_size``, one more than the largest id; ``bos_id``, ``eos_id``, ``pad_id``; ``control_ids``, of every
    control token; ``definition``, the text of its file; ``token_bytes``, int32 [V], the bytes of UTF-8 that each token
    stands for and 0 for control tokens, whose sum over a text's ids is the text's length in bytes.
    """

    def __init__(self, definition: str, *, source: str):
        """Builds it from the text of a ``tokenizer.json``; ``source`` is what errors call it.

        Errors: ConfigError if it is broken, lacks a control token, or does not keep text as it is.
        """
        self._source = source
        self.definition = definition
        try:
            described = json.loads(definition)
            # "Not special" means in that file that text may spell the token. Here text never may.
            for token in described["added_tokens"]:
                token["special"] = True
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(described))
            self._check_ids({token["content"]: token["id"] for token in described["added_tokens"]})
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{source} is not a usable tokenizer.json: {error}") from error
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.control_ids = frozenset(self._inner.get_added_tokens_decoder())
        self.bos_id, self.eos_id, self.pad_id = (self.id_of(name) for name in (BOS, EOS, PAD))
        self.vocab_size = max(self._inner.get_vocab().values()) + 1
        self.token_bytes = self._count_bytes()
        self._check_keeps_text()

    def id_of(self, name: str) -> int:
        """Id of a control token; ConfigError if the tokenizer has none of that name."""
        token_id = self._inner.token_to_id(name)
        if token_id is None or token_id not in self.control_ids:
            raise ConfigError(f"{self._source} has no control token {name}: use a DeepSeek tokenizer.json")
        return token_id

    def check_fits(self, vocab_size: int, *, called: str = "model.vocab_size") -> None:
        """Raises ConfigError if there are ids that a model of ``vocab_size`` has no embedding for."""
        if self.vocab_size > vocab_size:
            raise ConfigError(
                f"{called}={vocab_size} is less than the {self.vocab_size} ids of {self._source}: "
                f"use at least {self.vocab_size}"
            )

    def encode_documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """Ids of each text, on all cores. No control token is added, and none that a text spells is made."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "T"], *, skip_control: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_control)

    def save(self, path: Path) -> None:
        """Writes the ``tokenizer.json`` as it was given."""
        path.write_text(self.definition, encoding="utf-8", newline="")

    def _count_bytes(self) -> Int32[np.ndarray, "V"]:
        counts = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._inner.get_vocab().items():
            # The byte-level alphabet writes each byte as one character.
            counts[token_id] = 0 if token_id in self.control_ids else len(token)
        return counts

    def _check_ids(self, written: dict[str, int]) -> None:
        # The library numbers added tokens on from the vocabulary, whatever id the file gives them.
        for name, token_id in written.items():
            read_as = self._inner.token_to_id(name)
            if read_as != token_id:
                raise ValueError(f"{name} has id {token_id} and would be read as {read_as}")

    def _check_keeps_text(self) -> None:
        """Raises ConfigError unless every byte and every spelt control token survives as ordinary text."""
        names = "\n".join(token.content for token in self._inner.get_added_tokens_decoder().values())
        text = " \t x" + _EVERY_BYTE + "e\u0301\r\n\n" + names
        (ids,) = self.encode_documents([text])
        kept = self.decode(ids, skip_control=False) == text and self.control_ids.isdisjoint(ids.tolist())
        if not kept or self.token_bytes[ids].sum() != len(text.encode()):
            raise ConfigError(
                f"{self._source} changes text when it encodes it: use a byte-level BPE without normalisation"
            )


def load_tokenizer(path: str | Path, *, called: str | None = None) -> Tokenizer:
    """Reads a ``tokenizer.json``, such as a DeepSeek checkpoint's; errors call it ``called``, or data.tokenizer.

    Errors: ConfigError if it is missing, broken or of another kind.
    """
    called = called or f"data.tokenizer={str(path)!r}"
    try:
        definition = Path(path).expanduser().read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{called} cannot be read: {error}") from error
    return Tokenizer(definition, source=called)


def check_holds_bytes(vocab_size: int, *, called: str = "model.vocab_size") -> None:
    """Raises ConfigError if a tokenizer of so many ids does not hold the control tokens and the 256 bytes."""
    least = len(CONTROL_TOKENS) + 256
    if vocab_size < least:
        raise ConfigError(
            f"{called}={vocab_size} does not hold 256 bytes and {len(CONTROL_TOKENS)} control tokens: "
            f"use at least {least}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of ``vocab_size`` ids, the control tokens first; fewer if the text gives fewer.

    Errors: ConfigError if ``vocab_size`` does not hold the control tokens and the 256 bytes.
    """
    check_holds_bytes(vocab_size)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    # Of no effect here, where control tokens are added by hand; transformers' tokenizer begins texts with it.
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner.to_str(), source="the tokenizer trained on the text")
