"""What is held out, and the sample for the tokenizer."""

import dataclasses
import hashlib
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError
from dsjax.data.corpus import Corpus, Document, read_corpus
from dsjax.data.split import sample, split


def imagined(number: int, name: str = "") -> Document:
    """A document that is on no disk, which splitting by hash never asks for."""
    digest = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    return Document(Path(str(number)), name or str(number), digest, (10, 0), 0, 10)


def corpus_of(folder: Path, *texts: str) -> Corpus:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text.encode())
    return read_corpus((str(folder),))


def text_of(documents: list[Document]) -> str:
    ordered = sorted(documents, key=lambda document: document.name)
    return "".join(piece for document in ordered for piece in document.pieces())


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.4])
def test_the_share_is_the_fraction(fraction):
    training, heldout = split(Corpus(tuple(map(imagined, range(20_000))), ()), fraction)
    assert len(training) + len(heldout) == 20_000
    # Four standard deviations of a binomial share.
    assert abs(len(heldout) / 20_000 - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


def test_names_order_and_other_documents_move_nothing_across():
    documents = [imagined(number) for number in range(500)]
    _, heldout = split(Corpus(tuple(documents), ()), 0.1)
    renamed = [dataclasses.replace(document, name=f"n{i}") for i, document in enumerate(documents[::-1])]
    _, again = split(Corpus(tuple(renamed), ()), 0.1)
    assert {document.digest for document in again} == {document.digest for document in heldout}
    _, more = split(Corpus((*documents, *map(imagined, range(500, 600))), ()), 0.1)
    assert set(heldout) <= set(more)


def test_neighbours_by_name_are_not_neighbours_in_training():
    documents = tuple(imagined(number) for number in range(1000))
    training, _ = split(Corpus(documents, ()), 0.02)
    numbers = [int(document.name) for document in training]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(numbers)) < 20
    assert split(Corpus(documents, ()), 0.02)[0] == training


def test_one_file_is_cut_at_a_line_break(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    training, heldout = split(corpus_of(tmp_path, text), 0.02)
    assert text_of(training) + text_of(heldout) == text
    assert text_of(training).endswith("\n")
    assert 0.02 <= len(text_of(heldout)) / len(text) <= 0.03


def test_a_file_of_one_long_line_is_cut_near_the_fraction(tmp_path):
    text = "head\n" + "中" * 5000
    training, heldout = split(corpus_of(tmp_path, text), 0.1)
    assert text_of(training) + text_of(heldout) == text
    assert 0.1 <= len(text_of(heldout)) / len(text) <= 0.101


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=8), fraction=st.floats(0.01, 0.49))
def test_any_one_file_of_8_characters_is_cut_into_two_texts(tmp_path_factory, text, fraction):
    training, heldout = split(corpus_of(tmp_path_factory.mktemp("cut"), text), fraction)
    assert text_of(training)
    assert text_of(heldout)
    assert text_of(training) + text_of(heldout) == text


def test_each_of_a_few_documents_gives_its_tail(tmp_path):
    texts = [f"document {number}\n" * 100 for number in range(3)]
    training, heldout = split(corpus_of(tmp_path, *texts), 0.02)
    assert len(training) == len(heldout) == 3
    for head in training:
        (tail,) = [document for document in heldout if document.name == head.name]
        assert text_of([head]) + text_of([tail]) in texts


def test_one_character_cannot_be_cut(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.paths has 1 bytes"):
        split(corpus_of(tmp_path, "x"), 0.02)


def test_the_sample_is_bounded_spread_out_and_always_the_same(tmp_path):
    rng = random.Random(1)
    texts = [str(number) * rng.randint(1, 300_000) for number in range(8)]
    documents = corpus_of(tmp_path, *texts).documents
    drawn = list(sample(documents, 400_000))
    assert drawn == list(sample(documents, 400_000))
    assert 400_000 <= sum(map(len, drawn)) < 400_000 + 65_536
    assert len({block[0] for block in drawn}) >= 3
    assert sum(map(len, sample(documents, 10**9))) == sum(map(len, texts))


def test_the_sample_of_wide_characters_is_text(tmp_path):
    documents = corpus_of(tmp_path, "中" * 60_000).documents
    assert set("".join(sample(documents, 10**9))) == {"中"}
