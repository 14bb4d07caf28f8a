"""Text, JSON lines and parquet, whole, in parts, compressed and damaged."""

import bz2
import gzip
import itertools
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dsjax.data.readers import Part, Reject, Text, read

COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def whole(path: Path, *, most_bytes: int = 10_000, text_field: str = "text") -> list[Text | Reject]:
    part = Part(path, path.name, 0, path.stat().st_size)
    return list(read(part, text_field=text_field, most_bytes=most_bytes))


def lines(*records) -> bytes:
    return b"".join(
        (record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n" for record in records
    )


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_every_compression(tmp_path, ending):
    compress = COMPRESSIONS[ending]
    (tmp_path / f"a.txt{ending}").write_bytes(compress("\ufeffGrüße\n".encode()))
    assert whole(tmp_path / f"a.txt{ending}") == [Text(f"a.txt{ending}", "Grüße\n")]
    (tmp_path / f"b.jsonl{ending}").write_bytes(
        compress(b"\xef\xbb\xbf" + lines({"text": "x"}, {"text": "Ü"}))
    )
    assert [found.text for found in whole(tmp_path / f"b.jsonl{ending}")] == ["x", "Ü"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_archive_keeps_what_came_before(tmp_path, ending, damage):
    content = lines(*({"text": f"{number} " * 50} for number in range(2000)))
    packed = COMPRESSIONS[ending](content)
    spoilt = {"cut": packed[: len(packed) // 2], "changed": b"no archive" + packed[10:], "empty": b""}[damage]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(spoilt)
    *documents, last = [None, *whole(path)]
    for number, found in enumerate(documents[1:]):
        if isinstance(found, Text):
            assert found.text == f"{number} " * 50
    if damage == "empty" and last is None:
        return  # to some, no archives one after the other is an archive
    assert isinstance(last, Reject)
    assert (last.name, last.reason) == (path.name, "damaged")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=20), st.lists(st.integers(0, 600), max_size=4), st.booleans())
def test_parts_of_json_lines_are_the_whole(tmp_path_factory, texts, cuts, ends_with_line):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    encodable = [text for text in texts if not any(0xD800 <= ord(c) < 0xE000 for c in text)]
    content = lines(*({"text": text} for text in encodable), b"")
    path.write_bytes(content if ends_with_line else content.rstrip(b"\n"))
    size = path.stat().st_size
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    found = []
    for start, stop in itertools.pairwise(edges):
        found += read(Part(path, "a", start, stop), text_field="text", most_bytes=10_000)
    assert [each.text for each in found] == encodable
    assert len({each.name for each in found}) == len(found)


def test_what_is_no_document_is_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        (b'{"text": ', "not JSON"),
        (b"[" * 50_000, "not JSON"),
        ({"body": "x"}, "no text in field 'text'"),
        ({"text": None}, "no text in field 'text'"),
        ([1], "no text in field 'text'"),
        ({"text": "y" * 10_001}, "too long"),
        (b'{"text": "' + b"z" * 200_000 + b'"}', "too long"),
    ]
    path.write_bytes(lines(*(line for record, _ in bad for line in (record, {"text": "good"})), b"", b"  "))
    found = whole(path)
    assert [each.reason for each in found if isinstance(each, Reject)] == [reason for _, reason in bad]
    assert [each.text for each in found if isinstance(each, Text)] == ["good"] * len(bad)
    offsets = [int(each.name.removeprefix("a.jsonl:")) for each in found]
    content = path.read_bytes()
    assert all(offset == 0 or content[offset - 1 : offset] == b"\n" for offset in offsets)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_of_many_megabytes_costs_no_memory(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    found = whole(path, most_bytes=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [type(each) for each in found] == [Reject, Text]
    assert found[0] == Reject(f"{name}:0", "too long")
    assert peak < 16 << 20


def test_files_of_text(tmp_path):
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "cut").write_bytes("é".encode()[:1])
    (tmp_path / "long").write_bytes(b"x" * 10_001)
    (tmp_path / "most").write_bytes(b"x" * 10_000)
    (tmp_path / "ends").write_bytes(b"\xef\xbb\xbfdos\r\nmac\runix\n\x00")
    assert [each.reason for each in whole(tmp_path / "latin")] == ["not UTF-8"]
    assert [each.reason for each in whole(tmp_path / "cut")] == ["not UTF-8"]
    assert whole(tmp_path / "long") == [Reject("long:0", "too long")]
    assert whole(tmp_path / "most") == [Text("most", "x" * 10_000)]
    assert whole(tmp_path / "ends") == [Text("ends", "dos\r\nmac\runix\n\x00")]
    gone = Part(tmp_path / "gone", "gone", 0, 1)
    assert [each.reason for each in read(gone, text_field="text", most_bytes=10)] == ["unreadable"]


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.text(max_size=15), max_size=30),
    too_long=st.text(min_size=41, max_size=150).map(lambda line: line.replace("\n", " ")),
    place=st.integers(0, 30),
    ends_with_line=st.booleans(),
)
@example(["\ufeff a mark", "", "\ufeff at the start of a line", "and so on " * 3] * 3, "x" * 41, 3, True)
@example(["a line"] * 20, "x" * 40, 0, False)
@example(["a line"] * 5, "x" * 39 + "é", 5, False)
def test_a_long_file_is_cut_at_line_ends(tmp_path_factory, lines, too_long, place, ends_with_line):
    """What is kept and what is not are the file, piece by piece; documents have as many lines as they may."""
    path = tmp_path_factory.mktemp("long") / "a.txt"
    text = "\n".join([*lines[:place], too_long, *lines[place:]]) + "\n" * ends_with_line
    path.write_bytes(content := text.encode())
    found = whole(path, most_bytes=40)
    starts = [int(each.name.removeprefix("a.txt:")) for each in found]
    assert starts[0] == 0
    for each, start, stop in zip(found, starts, [*starts[1:], len(content)], strict=True):
        piece, line_after = content[start:stop], content[stop : content.find(b"\n", stop) + 1 or None]
        assert start == 0 or content[start - 1 : start] == b"\n"
        if isinstance(each, Reject):
            assert each == Reject(f"a.txt:{start}", "too long")
            assert len(piece) > 40
            assert b"\n" not in piece[:-1]
        else:
            assert each.text == piece.decode("utf-8-sig" if start == 0 else "utf-8")
            assert len(piece) <= 40
            assert len(piece + line_after) > 40 or not line_after
    assert any(isinstance(each, Reject) for each in found)


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_a_long_file_is_cut_in_the_same_places_in_any_archive(tmp_path, ending):
    lines = [f"line {number} {'é中' * (number % 50)}\n" for number in range(20_000)]
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESSIONS[ending]("".join(lines).encode()))
    found = whole(path, most_bytes=100_000)
    assert "".join(each.text for each in found) == "".join(lines)
    sizes = [len(each.text.encode()) for each in found]
    assert all(100_000 - 300 < size <= 100_000 for size in sizes[:-1])
    starts = itertools.accumulate([0, *sizes[:-1]])
    assert [each.name for each in found] == [f"a.txt{ending}:{start}" for start in starts]


def test_only_the_piece_that_is_not_utf8_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 10 + b"caf\xe9\n" + b"good\n" * 10)
    found = whole(tmp_path / "a.txt", most_bytes=20)
    assert [each.name for each in found if isinstance(each, Reject)] == ["a.txt:40"]
    (rejected,) = (each for each in found if isinstance(each, Reject))
    assert (rejected.reason, rejected.sample) == ("not UTF-8", r"b'good\ngood\ncaf\xe9\ngood\n'")
    assert "".join(each.text for each in found if isinstance(each, Text)) == "good\n" * 17


def test_parquet_by_row_groups(tmp_path):
    path = tmp_path / "web.parquet"
    values = [f"text {number}" if number % 7 else None for number in range(300)]
    table = pyarrow.table({"id": list(range(300)), "text": values})
    parquet.write_table(table, path, row_group_size=100)
    found = []
    for group in range(3):
        found += read(Part(path, "web", group, group + 1), text_field="text", most_bytes=100)
    assert [getattr(each, "text", None) for each in found] == values
    assert found[0] == Reject("web:0:0", "no text in field 'text'", "None")
    assert found[101].name == "web:1:1"
    (missing,) = read(Part(path, "web", 0, 1), text_field="body", most_bytes=100)
    assert missing == Reject("web", "no text in field 'body'", "id, text")
    path.write_bytes(path.read_bytes()[:-20])
    (damaged,) = read(Part(path, "web", 0, 1), text_field="text", most_bytes=100)
    assert damaged.reason == "damaged"


def test_a_row_that_is_no_text_costs_that_row_alone(tmp_path):
    rows = [f"row {number}".encode() for number in range(1000)]
    rows[3] = b"\xff\xfe bad"
    column = pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=400)
    found = list(read(Part(tmp_path / "a.parquet", "a", 0, 3), text_field="text", most_bytes=100))
    assert [item.text for item in found if isinstance(item, Text)] == [
        f"row {number}" for number in range(1000) if number != 3
    ]
    assert [item[:2] for item in found if isinstance(item, Reject)] == [("a:0:3", "not UTF-8")]


def test_long_rows_are_read_one_by_one(tmp_path):
    """Forty rows of 4 MB, each a page, take the memory of a few."""
    table = pyarrow.table({"text": [str(number) * (4 << 20) for number in range(10)] * 4})
    layout = {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 1 << 20}
    parquet.write_table(table, tmp_path / "a.parquet", **layout)
    del table
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    most = 0
    for _ in read(Part(tmp_path / "a.parquet", "a", 0, 1), text_field="text", most_bytes=8 << 20):
        most = max(most, pyarrow.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert most < 40 << 20


@pytest.mark.parametrize("name", ["A.TXT.GZ", "a.JSONL.gz"])
def test_endings_are_read_in_either_case(tmp_path, name):
    content = b"text" if "TXT" in name else b'{"text": "text"}'
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert [item.text for item in whole(tmp_path / name)] == ["text"]
