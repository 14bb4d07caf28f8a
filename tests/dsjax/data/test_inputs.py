"""Files found and divided into tasks."""

import bz2
import itertools
import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dsjax.config import ConfigError
from dsjax.data import inputs
from dsjax.data.inputs import find_tasks
from dsjax.data.readers import Part, Reject, Text, read

MB = 1 << 20


def parts_of(*paths) -> list[Part]:
    tasks, _ = find_tasks(tuple(map(str, paths)), "--input")
    return list(itertools.chain.from_iterable(tasks))


def names_of(*paths) -> set[str]:
    """The last parts of the names of all files."""
    return {Path(part.name).name for part in parts_of(*paths)}


def rejects_of(*paths) -> dict[str, tuple[str, str]]:
    _, rejects = find_tasks(tuple(map(str, paths)), "--input")
    return {Path(item.name).name: (item.reason, item.sample) for item in rejects}


def texts_in(parts: list[Part]) -> list[Text | Reject]:
    return [found for part in parts for found in read(part, text_field="text", most_bytes=10**6)]


@pytest.fixture
def folder(tmp_path):
    """Files of every kind, with 260 documents in all."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"file {number}" * 10)
    lines = [json.dumps({"text": f"line {number}" * 5}) for number in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:50]))
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress("\n".join(lines[50:]).encode()))
    table = pyarrow.table({"text": [f"row {number}" * 5 for number in range(150)]})
    parquet.write_table(table, tmp_path / "w.parquet", row_group_size=20)
    return tmp_path


@pytest.mark.parametrize("task_bytes", [100, 1000, 10**9])
def test_every_document_is_in_one_part_of_one_task(folder, task_bytes, monkeypatch):
    monkeypatch.setattr(inputs, "_LEAST_TASK_BYTES", task_bytes)
    tasks, rejects = find_tasks((str(folder),), "--input")
    assert rejects == []
    assert (len(tasks) > 10) == (len(tasks) > 1) == (task_bytes < 10**9)
    for task in tasks:
        assert len(task) == 1 or sum(part.size_bytes for part in task) <= task_bytes
    found = texts_in(list(itertools.chain.from_iterable(tasks)))
    assert all(isinstance(text, Text) for text in found)
    assert len({text.text for text in found}) == len(found) == 260
    assert len({text.name for text in found}) == 260


def test_the_order_of_the_inputs_makes_no_difference(folder):
    found = find_tasks((str(folder),), "--input")
    assert found == find_tasks((f"{folder}/*.txt", str(folder / "w.parquet"), str(folder)), "--input")
    names = [part.name for part in parts_of(folder)]
    assert names == sorted(names)


@pytest.mark.parametrize(("size_bytes", "count"), [(10 * MB, 10), (1024 * MB, 64), (40_960 * MB, 160)])
def test_tasks_are_many_enough_and_not_too_large(tmp_path, size_bytes, count):
    """Of 1 MiB to 256 MiB, and 64 between these; the file has a size and nothing in it."""
    (tmp_path / "web.jsonl").touch()
    os.truncate(tmp_path / "web.jsonl", size_bytes)
    tasks, _ = find_tasks((str(tmp_path),), "--input")
    assert len(tasks) == count
    edges = [(part.start, part.stop) for (part,) in tasks]
    assert (edges[0][0], edges[-1][1]) == (0, size_bytes)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    assert sum(part.size_bytes for (part,) in tasks) == size_bytes


def test_a_part_knows_the_file_that_was_found(folder):
    for part in parts_of(folder):
        status = part.path.stat()
        assert part.stamp == (status.st_size, status.st_mtime_ns)


def test_without_inputs_the_library_of_this_python_is_read():
    names = [part.name for part in parts_of()]
    assert len(names) > 300
    assert names == sorted(names)
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
    assert all(name.endswith(".py") for name in names)


def test_a_python_without_library_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.sysconfig, "get_path", lambda name: str(tmp_path / "zipped"))
    wanted = r"data\.paths is empty and this Python keeps no library sources: name some text files"
    with pytest.raises(ConfigError, match=wanted):
        find_tasks((), "data.paths")


def test_files_folders_and_globs_are_found_and_hidden_ones_are_not(tmp_path):
    names = ("one.txt", "deep/er/two.md", "deep/.hidden", "deep/.git/three.txt", "glob/a.log", "glob/b.txt")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = names_of(tmp_path / "one.txt", tmp_path / "deep", tmp_path / "glob" / "*.txt")
    assert found == {"one.txt", "two.md", "b.txt"}
    assert names_of(tmp_path / "**" / "*.txt") == {"one.txt", "b.txt"}


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("one")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names_of("~/one.txt") == names_of("~/*.txt") == {"one.txt"}


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to(tmp_path / "one.txt")
    assert len(parts_of(tmp_path, tmp_path / "one.txt", tmp_path / "*.txt")) == 1


def test_a_name_with_glob_signs_is_a_file_where_there_is_one(tmp_path):
    (tmp_path / "a[1].txt").write_text("literal")
    (tmp_path / "a1.txt").write_text("what it matches")
    assert names_of(tmp_path / "a[1].txt") == {"a[1].txt"}


def test_a_file_name_that_is_not_utf8_can_be_reported(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    (part,) = parts_of(tmp_path)
    assert part.name.endswith("caf\\xe9.txt")
    assert texts_in([part]) == [Text(part.name, "text")]


def test_what_cannot_be_read_is_listed_with_the_reason(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.txt")
    assert rejects_of(tmp_path) == {
        "dangling.txt": ("unreadable", "No such file or directory"),
        "pipe.txt": ("unreadable", "not a regular file"),
    }
    assert names_of(tmp_path) == {"good.txt"}


def test_a_damaged_parquet_file_is_a_part_that_says_so(folder):
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (broken,) = (part for part in parts_of(folder) if part.path.name == "broken.parquet")
    assert [(found.name, found.reason) for found in texts_in([broken])] == [(broken.name, "damaged")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_listed(tmp_path):
    for name in ("secret.txt", "secret.parquet"):
        (tmp_path / name).write_text("secret")
        (tmp_path / name).chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    assert rejects_of(tmp_path) == {"closed": ("unreadable", "Permission denied")}
    assert [found.reason for found in texts_in(parts_of(tmp_path))] == ["unreadable"] * 2


def test_an_unreadable_folder_is_listed(tmp_path, monkeypatch):
    """The same without rights to take away, which root ignores."""
    (tmp_path / "good.txt").write_text("good")

    def walk(root, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        yield str(tmp_path), [], ["good.txt"]

    monkeypatch.setattr(inputs.os, "walk", walk)
    assert rejects_of(tmp_path) == {"closed": ("unreadable", "Permission denied")}
    assert names_of(tmp_path) == {"good.txt"}


@pytest.mark.parametrize("pattern", ["missing.txt", "empty", "*.none"])
def test_an_input_that_matches_nothing_is_an_error_with_its_value(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.txt").write_text("there")
    with pytest.raises(ConfigError, match=r"data\.paths: .* matches no file") as error:
        find_tasks((str(tmp_path / "there.txt"), str(tmp_path / pattern)), "data.paths")
    assert pattern in str(error.value)


def test_nothing_that_can_be_read_is_an_error_with_the_reasons(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"data\.paths=.*no file that can be read .*pipe: not a regular"):
        find_tasks((str(tmp_path),), "data.paths")


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/linked.txt").write_text("linked")
    (tmp_path / "in/deep/own.txt").write_text("own")
    (tmp_path / "in/deep/other").symlink_to(tmp_path / "elsewhere")
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in")
    tasks, rejects = find_tasks((str(tmp_path / "in"),), "--input")
    assert [part.path.name for task in tasks for part in task] == ["linked.txt", "own.txt"]
    assert rejects == []


@pytest.mark.parametrize("folder", ["blobs", "zblobs"])
def test_of_several_names_of_a_file_the_one_with_an_ending_counts(tmp_path, folder):
    """As in a cache that keeps files under their hashes, whichever name comes first."""
    (tmp_path / folder).mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / folder / "4fa3c").write_text('{"text": "x"}')
    (tmp_path / "snapshots/a.jsonl").symlink_to(tmp_path / folder / "4fa3c")
    tasks, _ = find_tasks((str(tmp_path),), "--input")
    assert [part.path.name for task in tasks for part in task] == ["a.jsonl"]


def test_the_output_and_compiled_files_are_left_out(tmp_path):
    for name in ("a.py", "__pycache__/a.pyc", "out/train-00000.array_record", "outer/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    tasks, _ = find_tasks((str(tmp_path), f"{tmp_path}/out/*"), "--input", tmp_path / "out")
    assert [part.path.name for task in tasks for part in task] == ["a.py", "b.py"]
