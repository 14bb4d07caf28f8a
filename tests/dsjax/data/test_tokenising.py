"""From selected texts to a tokenizer and shards of tokens."""

import argparse
import hashlib
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stage_by_stage import begun, done, write_files

from dsjax.data import inputs, tokenising
from dsjax.data.plan import Plan
from dsjax.data.selection import HELDOUT, TRAIN, load_sides
from dsjax.data.token_set import TokenSet
from dsjax.data.tokenising import bytes_to_tokenise, tail_start
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SOURCE_TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
TEXTS = [f"document {n} says {'é中 ' * (n % 7)}\n" * (1 + n % 5) for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SOURCE_TEXT], 600)


def accounts_of(plan: Plan) -> list[dict]:
    return [json.loads((plan.work / f"tokens-{n:05}.json").read_bytes()) for n in range(len(plan.tasks))]


def texts_of(plan: Plan, side: str) -> list[str]:
    """What the tokens of a side say, in order."""
    tokenizer = load_tokenizer(plan.folder / "tokenizer.json")
    found = TokenSet(plan.folder, [account[side]["name"] for account in accounts_of(plan)])
    lengths = enumerate(found.lengths.tolist())
    return [tokenizer.decode(found.text(number, 0, length), skip_control=False) for number, length in lengths]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab中\n", min_size=2), fraction=st.floats(0.01, 0.49))
@example("0123456\n\n" * 50, 0.02)
@example("no line break", 0.02)
@example("\n" * 100, 0.1)
def test_a_tail_is_about_as_long_as_wanted_and_begins_a_line_where_it_may(text, fraction):
    start = tail_start(text, fraction)
    wanted = len(text) - int(len(text) * (1 - fraction))
    assert 0 < start < len(text)
    tail = len(text) - start
    assert wanted <= tail <= 2 * wanted
    # The nearest of the line breaks that leave no shorter tail and one that is not twice as long.
    breaks = [
        n + 1 for n, letter in enumerate(text) if letter == "\n" and wanted < len(text) - n <= 2 * wanted
    ]
    assert start == max(breaks, default=len(text) - wanted)


def test_one_document_is_cut_at_a_line_break(tmp_path, tokenizer):
    text = "".join(f"line {number}\n" for number in range(1000))
    plan = begun(tmp_path / "set", write_files(tmp_path / "text", text), given=tokenizer)
    (head,), (tail,) = (texts_of(done(plan, "tokenise"), side) for side in ("train", "heldout"))
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.02 <= len(tail) / len(text) <= 0.03


def test_each_of_a_few_documents_gives_its_tail(tmp_path, tokenizer):
    texts = [f"{'中' * number} document {number}, in one line" * 9 for number in range(3)]
    plan = begun(
        tmp_path / "set", write_files(tmp_path / "text", *texts), given=tokenizer, heldout_fraction=0.001
    )
    heads, tails = (texts_of(done(plan, "tokenise"), side) for side in ("train", "heldout"))
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == texts
    assert all(len(tail) == 1 for tail in tails)


def test_of_a_text_of_one_character_only_a_tail_is_left(tmp_path, tokenizer):
    files = write_files(tmp_path / "text", "x", "01234567")
    plan = begun(tmp_path / "set", files, given=tokenizer, heldout_fraction=0.4)
    assert texts_of(done(plan, "tokenise"), "train") == ["0123"]
    assert texts_of(plan, "heldout") == ["x", "4567"]


@pytest.fixture
def in_tasks(tmp_path, tokenizer, monkeypatch):
    """Documents of both sides in many tasks, tokenised in pieces of a few lines."""
    monkeypatch.setattr(inputs, "_LEAST_TASK_BYTES", 500)
    monkeypatch.setattr(tokenising, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", 150)
    folder = write_files(tmp_path / "text", *TEXTS, TEXTS[0])
    return done(begun(tmp_path / "set", folder, given=tokenizer, heldout_fraction=0.2), "tokenise")


def test_documents_in_pieces_stay_whole_and_in_order(in_tasks):
    side = load_sides(in_tasks).side
    for name, number in (("train", TRAIN), ("heldout", HELDOUT)):
        wanted = [text for text, own in zip([*TEXTS, TEXTS[0]], side, strict=True) if own == number]
        assert texts_of(in_tasks, name) == wanted
        assert len(wanted) > 3
        assert max(map(len, wanted)) > 100


def test_the_account_is_of_what_the_files_hold(in_tasks):
    accounts = accounts_of(in_tasks)
    assert len(accounts) == len(in_tasks.tasks) > 5
    for side in ("train", "heldout"):
        texts = texts_of(in_tasks, side)
        lengths = TokenSet(in_tasks.folder, [account[side]["name"] for account in accounts]).lengths
        counts = {
            name: sum(account[side][name] for account in accounts)
            for name in ("documents", "bytes", "tokens")
        }
        size_bytes = sum(len(text.encode()) for text in texts)
        assert counts == {"documents": len(texts), "bytes": size_bytes, "tokens": int(lengths.sum())}
        for number, account in enumerate(accounts):
            files = [
                in_tasks.folder / f"{side}-{number:05}{ending}"
                for ending in (".array_record", ".lengths.npy")
            ]
            content = b"".join(file.read_bytes() for file in files)
            assert account[side]["blake2b"] == hashlib.blake2b(content, digest_size=16).hexdigest()
    done_bytes = sum(bytes_to_tokenise(in_tasks, task) for task in range(len(accounts)))
    assert done_bytes == sum(len(text.encode()) for text in TEXTS)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abc中\n"), most=st.integers(1, 12))
@example("0123\n" * 9, 5)
def test_pieces_end_with_a_line_where_there_is_one(text, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "PIECE_CHARACTERS", most)
        pieces = list(tokenising._pieces(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    for piece, after in itertools.pairwise(pieces):
        assert piece.endswith("\n") or (len(piece) == most and "\n" not in piece)
        line_after = after[: after.find("\n") + 1]
        assert len(piece + line_after) > most or not line_after


def test_pieces_have_the_tokens_of_the_whole(tmp_path, tokenizer, monkeypatch):
    """Where lines end none of this tokenizer's tokens goes on."""
    text = "".join(f"a line of a file, number {number}\n" for number in range(500))
    monkeypatch.setattr(tokenising, "PIECE_CHARACTERS", 1000)
    plan = begun(tmp_path / "set", write_files(tmp_path / "text", text), given=tokenizer)
    (account,) = accounts_of(done(plan, "tokenise"))
    found = TokenSet(plan.folder, [account["train"]["name"]])
    (whole,) = tokenizer.encode_documents([text[: tail_start(text, 0.02)]])
    assert found.lengths.tolist() == [len(whole)]
    assert found.text(0, 0, len(whole)).tolist() == whole.tolist()


def test_a_given_tokenizer_is_kept_as_it_is(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "given.json")
    plan = begun(
        tmp_path / "set",
        write_files(tmp_path / "text", *TEXTS),
        tokenizer=str(tmp_path / "given.json"),
        vocab_size=0,
    )
    done(plan, "tokenizer")
    assert (plan.folder / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()


def test_a_tokenizer_is_trained_on_the_sample(tmp_path):
    plan = done(begun(tmp_path / "set", write_files(tmp_path / "text", *TEXTS), vocab_size=350), "tokenizer")
    wanted = train_tokenizer(tokenising._sample(plan), 350)
    assert load_tokenizer(plan.folder / "tokenizer.json").definition == wanted.definition


def test_a_folder_that_is_made_again_has_the_tokens_of_its_own_tokenizer(tmp_path):
    """In the same process, as in a notebook."""
    folder = write_files(tmp_path / "text", *TEXTS)
    for text in (SOURCE_TEXT, "another tokenizer of other words " * 50):
        plan = begun(tmp_path / "set", folder, given=train_tokenizer([text], 400), heldout_fraction=0.2)
        done(plan, "tokenise")
        assert sorted(texts_of(plan, "train") + texts_of(plan, "heldout")) == sorted(TEXTS)
        shutil.rmtree(tmp_path / "set")


# ---------------------------------------------------------------- the sample for a tokenizer


@pytest.fixture
def small_blocks(monkeypatch):
    def limit(most_bytes: int) -> None:
        monkeypatch.setattr(tokenising, "_LEAST_SAMPLE_BYTES", most_bytes)

    monkeypatch.setattr(tokenising, "_SAMPLE_BLOCK_BYTES", 100)
    monkeypatch.setattr(tokenising, "_SAMPLE_BYTES_PER_ID", 0)
    monkeypatch.setattr(inputs, "_LEAST_TASK_BYTES", 20_000)
    return limit


LETTERS = [chr(ord("a") + number) * random.Random(number).randint(1, 30_000) for number in range(26)]


def test_the_sample_is_even_and_always_the_same_and_of_training_text(tmp_path, small_blocks):
    plan = done(
        begun(tmp_path / "set", write_files(tmp_path / "text", *LETTERS), heldout_fraction=0.3), "select"
    )
    assert len(plan.tasks) > 5
    training = [text for text, side in zip(LETTERS, load_sides(plan).side, strict=True) if side == TRAIN]
    assert 10 < len(training) < 24
    total = sum(map(len, training))
    small_blocks(total // 4)
    drawn = list(tokenising._sample(plan))
    assert drawn == list(tokenising._sample(plan))
    assert total // 4 <= sum(map(len, drawn)) < total // 4 + 100
    assert all(len(set(block)) == 1 for block in drawn)
    for text in training:
        share = sum(len(block) for block in drawn if block[0] == text[0]) / len(text)
        # Five standard deviations of a share of so many blocks.
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / -(-len(text) // 100)) ** 0.5
    small_blocks(10**9)
    everything = "".join(tokenising._sample(plan))
    assert everything == "".join(training)


def test_the_sample_of_another_seed_is_another(tmp_path, small_blocks):
    small_blocks(1000)
    folder = write_files(tmp_path / "text", *LETTERS)
    one, two = (done(begun(tmp_path / str(seed), folder, seed=seed), "select") for seed in (1, 2))
    assert list(tokenising._sample(one)) != list(tokenising._sample(two))


def test_a_larger_vocabulary_takes_a_larger_sample(tmp_path, small_blocks, monkeypatch):
    small_blocks(1000)
    monkeypatch.setattr(tokenising, "_SAMPLE_BYTES_PER_ID", 20)
    folder = write_files(tmp_path / "text", *LETTERS)
    for vocab_size in (300, 5000):
        plan = done(begun(tmp_path / str(vocab_size), folder, vocab_size=vocab_size), "select")
        drawn = sum(map(len, tokenising._sample(plan)))
        assert 20 * vocab_size <= drawn < 20 * vocab_size + 100


def test_the_sample_leaves_the_tails_out(tmp_path, small_blocks):
    small_blocks(10**9)
    text = "".join(f"line {number}\n" for number in range(1000))
    plan = done(begun(tmp_path / "set", write_files(tmp_path / "text", text), heldout_fraction=0.3), "select")
    assert load_sides(plan).cut_tails
    head = text[: tail_start(text, 0.3)]
    drawn = list(tokenising._sample(plan))
    assert sum(map(len, drawn)) == len(head)
    assert all(block in head for block in drawn)


def test_the_sample_of_wide_characters_is_text(tmp_path, small_blocks):
    small_blocks(10**9)
    plan = done(begun(tmp_path / "set", write_files(tmp_path / "text", "中" * 6000)), "select")
    assert set("".join(tokenising._sample(plan))) == {"中"}
