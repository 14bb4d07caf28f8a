"""What the first stage makes of files: texts, what is known of them, and an account of what was turned away."""

import collections
import gc
import gzip
import hashlib
import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stage_by_stage import begun, done, write_files

from dsjax.config import ConfigError
from dsjax.data import cleaning, inputs
from dsjax.data.cleaning import Cleaned, clean, normalised
from dsjax.data.near_duplicates import signature
from dsjax.data.plan import Plan, load_plan

PARTS = [
    "\r",
    "\n",
    "\r\n",
    "e",
    "e\u0301",
    "é",
    "\u0958",
    "\u1100\u1161\u11a8",
    "ﬁ",
    "Å",
    "q\u0307\u0323",
    "a ",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=5)).map("".join))
@example("dos\r\nmac\runix\n\r\r\n\n")
def test_texts_are_composed_and_have_one_kind_of_line_end(text):
    """Against Python's universal newlines and its tables of Unicode."""
    found = normalised(text)
    assert found == unicodedata.normalize("NFC", io.StringIO(text, newline=None).read())
    assert "\r" not in found
    assert normalised(found) == found


def cleaned(plan: Plan, task: int = 0) -> Cleaned:
    return Cleaned(done(plan, "clean"), task)


def texts_of(found: Cleaned) -> list[str]:
    return list(found.texts(np.arange(len(found.sizes))))


def test_texts_are_kept_with_their_names_hashes_and_sizes(tmp_path):
    written = ["plain\n", "cafe\u0301\r\nnoir", "中文\n" * 100, "\ufefflast"]
    plan = begun(tmp_path / "set", write_files(tmp_path / "text", *written))
    found = cleaned(plan)
    wanted = ["plain\n", "café\nnoir", "中文\n" * 100, "last"]
    assert texts_of(found) == wanted
    assert found.names() == [f"{tmp_path}/text/00{number}.txt" for number in range(4)]
    assert found.sizes.tolist() == [len(text.encode()) for text in wanted]
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in wanted]
    assert [row.tobytes() for row in found.digests] == hashes
    assert len(found.signatures()) == 0


def test_signatures_are_kept_where_near_duplicates_are_looked_for(tmp_path):
    texts = [f"text number {number} of three, each with words of its own: {number**9}" for number in range(3)]
    found = cleaned(
        begun(tmp_path / "set", write_files(tmp_path / "text", *texts), keep_near_duplicates=False)
    )
    assert np.array_equal(found.signatures(), [signature(text) for text in texts])


CONTENTS = [f"{number} {'é中😀' * (number % 40)}\n" * (1 + number % 3) for number in range(100)]


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hundred")
    return done(begun(folder / "set", write_files(folder / "text", *CONTENTS)), "clean")


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 99)), block_bytes=st.sampled_from([1, 500, 1 << 20]))
@example([], 500)
@example(list(range(100)), 500)
def test_any_texts_are_read_back_byte_for_byte(hundred, numbers, block_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "_BLOCK_BYTES", block_bytes)
        found = list(Cleaned(hundred, 0).texts(np.array(numbers, np.int64)))
    assert found == [CONTENTS[number] for number in numbers]


def test_no_file_stays_open(hundred):
    """For a large set has more tasks than a process may have files open."""
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    tasks = [Cleaned(hundred, 0) for _ in range(10)]
    assert all(texts_of(task) == CONTENTS and len(task.names()) == 100 for task in tasks)
    assert len(os.listdir("/dev/fd")) == before


def test_a_task_without_any_text_is_read_back_as_such(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    found = cleaned(begun(tmp_path / "set", tmp_path / "blank.txt", keep_near_duplicates=False))
    assert texts_of(found) == found.names() == []
    assert found.digests.shape == (0, 16)
    assert found.account["reasons"] == {"empty": 1}


def test_everything_that_was_found_is_accounted_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "SAMPLES", 10)
    lines = [{"text": "long enough to be taken for code: é\r\n" + f"x = {number}"} for number in range(40)]
    lines += (
        [{"text": "\r\n \t"}] * 12
        + [{"text": "short"}] * 25
        + [{"body": "y" * 1000}] * 11
        + [{"text": "z" * 101}]
    )
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_bytes("schön".encode("latin-1"))
    found = cleaned(begun(tmp_path / "set", *tmp_path.glob("?.*"), quality="code", max_document_bytes=100))
    account = found.account
    kept = texts_of(found)
    assert len(kept) == len(found.sizes) == 40
    assert account["counts"]["filtered"] == {
        "documents": 40,
        "bytes": sum(len(text.encode()) for text in kept),
    }
    # What was read is counted as it is after normalising: a line end is one byte.
    assert account["counts"]["read"]["documents"] == 40 + 12 + 25
    assert account["counts"]["read"]["bytes"] - account["counts"]["filtered"]["bytes"] == 12 * 3 + 25 * 5
    missing = "no text in field 'text'"
    assert account["reasons"] == {"empty": 12, "too short": 25, missing: 11, "too long": 1, "not UTF-8": 1}
    samples = collections.defaultdict(list)
    for name, reason, sample in account["samples"]:
        samples[reason].append((name, sample))
    kept_samples = {"empty": 10, "too short": 10, missing: 10, "too long": 1, "not UTF-8": 1}
    assert {reason: len(own) for reason, own in samples.items()} == kept_samples
    assert {sample for _, sample in samples["too short"]} == {"short"}
    assert samples["not UTF-8"] == [(f"{tmp_path}/b.txt", repr("schön".encode("latin-1")))]
    start = len("\n".join(map(json.dumps, lines[:52]))) + 1
    assert samples["too short"][0][0] == f"{tmp_path}/a.jsonl:{start}"


def test_a_sample_is_not_the_whole_text(tmp_path):
    (tmp_path / "a.py").write_text("x = value\n" * 10_000)
    found = cleaned(begun(tmp_path / "set", tmp_path / "a.py", quality="auto"))
    assert found.account["samples"] == [[f"{tmp_path}/a.py", "repeated lines", "x = value\n" * 30]]


def test_the_ending_before_that_of_the_archive_chooses_the_rules(tmp_path):
    text = "def one_and_no_more(value):\n    return value\n"
    for name in ("a.py", "b.py.gz", "c.txt", "d.txt.gz", "e.jsonl.gz"):
        content = json.dumps({"text": text}) if "jsonl" in name else text
        (tmp_path / name).write_bytes(
            gzip.compress(content.encode()) if name.endswith("gz") else content.encode()
        )
    found = cleaned(begun(tmp_path / "set", *tmp_path.glob("?.*"), quality="auto"))
    assert [Path(name).name for name in found.names()] == ["a.py", "b.py.gz"]
    assert found.account["reasons"] == {"gopher_short_doc": 3}


def test_without_filters_only_what_is_empty_is_turned_away(tmp_path):
    texts = ["x", "\x00", "\ufffd" * 9, "a" * 5000, "DO NOT EDIT: @generated", " \n"]
    found = cleaned(begun(tmp_path / "set", write_files(tmp_path / "text", *texts), quality="none"))
    assert texts_of(found) == texts[:-1]
    assert found.account["reasons"] == {"empty": 1}


def test_tasks_together_are_all_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_LEAST_TASK_BYTES", 100)
    plan = done(begun(tmp_path / "set", write_files(tmp_path / "text", *CONTENTS)), "clean")
    assert len(plan.tasks) > 20
    parts = [Cleaned(plan, task) for task in range(len(plan.tasks))]
    assert [text for part in parts for text in texts_of(part)] == CONTENTS


def test_another_process_reads_files_of_any_name(tmp_path):
    (tmp_path / "text").mkdir()
    with open(os.fsencode(tmp_path / "text") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    plan = begun(tmp_path / "set", tmp_path / "text")
    read_back = load_plan(plan.folder)
    assert read_back == plan
    found = cleaned(read_back)
    assert texts_of(found) == ["text"]
    assert found.names() == [f"{tmp_path}/text/caf\\xe9.txt"]


@pytest.mark.parametrize("change", ["longer", "another time", "gone"])
def test_a_file_that_is_not_the_one_that_was_found_is_an_error(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_text("text")
    plan = begun(tmp_path / "set", path)
    if change == "gone":
        path.unlink()
    elif change == "longer":
        path.write_text("longer text")
    else:
        os.utime(path, (1, 1))
    with pytest.raises(ConfigError, match=r"a\.txt changed since the work began"):
        done(plan, "clean")
    assert not (plan.work / "clean-00000.json").exists()


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")
    plan = begun(tmp_path / "set", path)
    read = cleaning.read

    def slowly(part, **options):
        yield from read(part, **options)
        path.write_text("other")

    monkeypatch.setattr(cleaning, "read", slowly)
    with pytest.raises(ConfigError, match=r"a\.txt changed since the work began"):
        clean(plan, 0, lambda size_bytes: None)
    assert not (plan.work / "clean-00000.json").exists()


def test_a_task_that_was_interrupted_is_done_anew(tmp_path):
    folder = write_files(tmp_path / "text", *CONTENTS)
    whole, interrupted = begun(tmp_path / "one", folder), begun(tmp_path / "two", folder)
    for name in ("clean-00000.array_record.unfinished", "clean-00000.array_record", "clean-00000.npz"):
        (interrupted.work / name).write_bytes(b"half")
    assert texts_of(cleaned(interrupted)) == texts_of(cleaned(whole)) == CONTENTS
    for name in ("array_record", "npz", "json"):
        one, two = (plan.work / f"clean-00000.{name}" for plan in (whole, interrupted))
        assert one.read_bytes() == two.read_bytes()
    assert not list(interrupted.work.glob("*.unfinished"))
