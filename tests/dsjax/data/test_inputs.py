"""Files found and divided into parts and tasks."""

import itertools
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from dsjax.config import ConfigError
from dsjax.data.inputs import divided, find_parts
from dsjax.data.readers import Part, Text, read


@pytest.fixture
def folder(tmp_path):
    """Files of every kind, with 260 documents in all."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"file {number}" * 10)
    lines = [json.dumps({"text": f"line {number}" * 5}) for number in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"text": [f"row {number}" * 5 for number in range(150)]})
    parquet.write_table(table, tmp_path / "w.parquet", row_group_size=20)
    return tmp_path


@pytest.mark.parametrize("task_bytes", [100, 1000, 10**9])
def test_every_document_is_in_one_part_of_one_task(folder, task_bytes):
    parts, rejects = find_parts([str(folder)], task_bytes)
    assert rejects == []
    tasks = divided(parts, task_bytes)
    assert list(itertools.chain.from_iterable(tasks)) == parts
    assert (len(tasks) > 10) == (task_bytes < 10**9)
    found = [text for part in parts for text in read(part, text_field="text", most_bytes=10**6)]
    assert all(isinstance(text, Text) for text in found)
    assert len({text.text for text in found}) == len(found) == 260
    assert parts == find_parts([f"{folder}/*.txt", str(folder / "a.jsonl"), str(folder)], task_bytes)[0]


def test_what_cannot_be_read_is_named(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    parts, rejects = find_parts([str(folder)])
    assert [(reject.name, reject.reason) for reject in rejects] == [(f"{folder}/pipe.txt", "unreadable")]
    broken = Part(folder / "broken.parquet", f"{folder}/broken.parquet", 0, 0)
    assert broken in parts
    assert [found.reason for found in read(broken, text_field="text", most_bytes=10)] == ["damaged"]


def test_an_input_without_files_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\*.txt' matches no file"):
        find_parts([f"{tmp_path}/nothing*.txt"])
