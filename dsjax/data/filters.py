"""Which documents are worth training on: rules for prose, others for code, and what no text should have.

Source: rules and limits for prose are Gopher's (Rae et al. 2021, table A1) and C4's, as datatrove has them; those for
code are StarCoder's (Li et al. 2023, §3) with the marks that programs leave in files they write.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import regex
from datatrove.data import Document
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer
from ftfy.badness import badness

# Files of these are prose where the user leaves the choice; files of other endings are code.
_PROSE = frozenset({"", ".txt", ".md", ".markdown", ".rst", ".tex", ".jsonl", ".ndjson", ".parquet"})
# Scripts that do not put blanks between words, and Hangul, whose words are as short.
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar")
_UNSPACED = "".join(rf"\p{{{script}}}" for script in _SCRIPTS)
_UNSPACED_WORDS = regex.compile(rf"[{_UNSPACED}]\p{{M}}*")
_WORDS = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}]+")
_MACHINE_WRITTEN = re.compile(
    r"@generated|do not (?:edit|modify)|auto-?generated|automatically generated|machine generated"
    r"|\b(?:code|file|codec \S+) (?:is |was )?generated",
    re.IGNORECASE,
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")

_FEW_GARBLED, _MOST_GARBLED = 2, 0.003  # characters, and their share: of sound text it is below 0.0004
_MOST_BOILERPLATE = 0.2  # of the lines
_HEAD_LINES = 10  # where programs say that they wrote a file
_LONGEST_LINE, _LONGEST_MEAN_LINE = 1000, 100  # characters
_LEAST_LETTERS, _MOST_DIGITS, _MOST_SYMBOLS = 0.25, 0.3, 0.5  # of the characters but blanks
_REPEATED_LINE, _LEAST_DIFFERENT = 8, 0.5  # lines longer than that many characters; share that must differ
_LEAST_CODE = 20  # characters but blanks
_UNSPACED_TEXT = 0.2  # of the words


class _Words(WordTokenizer):
    """What blanks divide, as Gopher has it, and each character of scripts without blanks; no model is downloaded."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _WORDS.finditer(text)]


def filter_for(suffix: str, quality: Literal["auto", "prose", "code"]) -> Callable[[str], str]:
    """What tells why a text of a file with this ending is turned away, or "" if it is not."""
    if quality == "auto":
        quality = "prose" if suffix.lower() in _PROSE else "code"
    rules = _prose if quality == "prose" else _code
    return lambda text: next(rules(text), "")


def _prose(text: str) -> Iterator[str]:
    yield from _garbled(text)
    document = Document(text=text, id="")
    for accept in _prose_filters(_is_unspaced(text)):
        verdict = accept.filter(document)
        if verdict is not True:
            yield verdict[1] if isinstance(verdict, tuple) else "gopher"
    yield from _boilerplate(text)


def _is_unspaced(text: str) -> bool:
    if text.isascii():
        return False
    words = _WORDS.findall(text)
    return len(_UNSPACED_WORDS.findall(text)) > _UNSPACED_TEXT * len(words)


@functools.cache
def _prose_filters(unspaced: bool) -> tuple[GopherRepetitionFilter | GopherQualityFilter, ...]:
    words: Any = _Words()  # taken, as are pairs in any number below, though the signatures say other types
    quality = GopherQualityFilter(language=words, min_stop_words=None)  # its stop words are those of English
    repetition: Any = GopherRepetitionFilter(language=words)
    if unspaced:  # where each of these words is a character, and a word of the language about two
        quality.min_avg_word_length = quality.max_avg_word_length = None
        repetition.top_n_grams = tuple((2 * n, share) for n, share in repetition.top_n_grams)
        repetition.dup_n_grams = tuple((2 * n, share) for n, share in repetition.dup_n_grams)
    return quality, repetition  # a text of two words is short, not repetitive


@functools.cache
def _policy_lines() -> C4QualityFilter:
    """Takes out lines about cookies and terms of use, and refuses documents with placeholder text."""
    off = {"min_num_sentences": -1, "min_words_per_line": -1, "max_word_length": -1}
    switches = ("remove_citations", "filter_no_terminal_punct", "filter_javascript", "filter_curly_bracket")
    return C4QualityFilter(**off, **dict.fromkeys(switches, False))


def _boilerplate(text: str) -> Iterator[str]:
    copy = Document(text=text, id="")  # the filter changes it
    verdict = _policy_lines().filter(copy)
    lines = text.strip().splitlines()
    if verdict is not True or len(copy.text.splitlines()) < (1 - _MOST_BOILERPLATE) * len(lines):
        yield "boilerplate"


def _code(text: str) -> Iterator[str]:
    """Letters, digits and symbols are counted among the characters that are not blank."""
    yield from _garbled(text)
    inked = "".join(text.split())
    if len(inked) < _LEAST_CODE:
        yield "too short"
    lines = text.splitlines()
    if _MACHINE_WRITTEN.search("\n".join(lines[:_HEAD_LINES])):
        yield "machine-written"
    lengths = [len(line) for line in lines if not line.isspace() and line]
    if max(lengths) > _LONGEST_LINE or sum(lengths) > _LONGEST_MEAN_LINE * len(lengths):
        yield "long lines"
    letters, digits = (sum(map(kind, inked)) / len(inked) for kind in (str.isalpha, str.isdigit))
    if digits > _MOST_DIGITS:
        yield "too many digits"
    if letters < _LEAST_LETTERS or 1 - letters - digits > _MOST_SYMBOLS:
        yield "too many symbols"
    inked_lines = [line for line in map(str.strip, lines) if len(line) > _REPEATED_LINE]
    if len(set(inked_lines)) < _LEAST_DIFFERENT * len(inked_lines):
        yield "repeated lines"


def _garbled(text: str) -> Iterator[str]:
    bad = text.count("\ufffd") + len(_CONTROL.findall(text))
    if not text.isascii():
        bad += badness(text)
    if bad > max(_FEW_GARBLED, _MOST_GARBLED * len(text)):
        yield "garbled"
