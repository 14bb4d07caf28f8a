"""Finding, checking and re-reading text files."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError
from dsjax.data import corpus
from dsjax.data.corpus import Corpus, read_corpus


def texts_of(found: Corpus) -> dict[str, str]:
    return {document.path.name: "".join(document.pieces()) for document in found.documents}


def reasons_of(found: Corpus) -> dict[str, str]:
    return {Path(item.name).name: item.reason for item in found.skipped}


def test_without_paths_the_library_of_this_python_is_read():
    found = read_corpus(())
    names = [document.name for document in found.documents]
    assert len(names) > 300
    assert names == sorted(names)
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
    assert all(name.endswith(".py") for name in names)
    assert read_corpus(()).fingerprint == found.fingerprint


def test_a_python_without_library_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "zipped"))
    with pytest.raises(ConfigError, match=r"data\.paths is empty"):
        read_corpus(())


def test_files_folders_and_globs_are_found_and_hidden_ones_are_not(tmp_path):
    for name in (
        "one.txt",
        "deep/er/two.md",
        "deep/.hidden",
        "deep/.git/three.txt",
        "glob/a.log",
        "glob/b.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    paths = (str(tmp_path / "one.txt"), str(tmp_path / "deep"), str(tmp_path / "glob" / "*.txt"))
    assert set(texts_of(read_corpus(paths))) == {"one.txt", "two.md", "b.txt"}
    everything = read_corpus((str(tmp_path / "**" / "*.txt"),))
    assert set(texts_of(everything)) == {"one.txt", "b.txt"}


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to(tmp_path / "one.txt")
    assert len(read_corpus((str(tmp_path), str(tmp_path / "one.txt"))).documents) == 1


def test_a_name_with_glob_signs_is_a_file_where_there_is_one(tmp_path):
    (tmp_path / "a[1].txt").write_text("literal")
    assert texts_of(read_corpus((str(tmp_path / "a[1].txt"),))) == {"a[1].txt": "literal"}


def test_bad_files_are_listed_with_the_reason_and_the_others_read(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    found = read_corpus((str(tmp_path),))
    assert texts_of(found) == {"good.txt": "good"}
    reasons = reasons_of(found)
    assert set(reasons) == {"latin.txt", "cut.txt", "empty.txt", "dangling.txt", "pipe"}
    assert reasons["latin.txt"].startswith("not UTF-8")
    assert reasons["cut.txt"].startswith("not UTF-8")
    assert reasons["empty.txt"] == "empty"
    assert reasons["dangling.txt"].startswith("unreadable: No such file")
    assert reasons["pipe"] == "not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_listed(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    reasons = reasons_of(read_corpus((str(tmp_path),)))
    assert set(reasons) == {"secret.txt", "closed"}
    assert all(reason == "unreadable: Permission denied" for reason in reasons.values())


def test_an_unreadable_folder_is_listed(tmp_path, monkeypatch):
    """The same without rights to take away, which root ignores."""
    (tmp_path / "good.txt").write_text("good")

    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        yield str(tmp_path), [], ["good.txt"]

    monkeypatch.setattr(corpus.os, "walk", walk)
    assert reasons_of(read_corpus((str(tmp_path),))) == {"closed": "unreadable: Permission denied"}


@pytest.mark.parametrize("pattern", ["missing.txt", "empty", "*.none"])
def test_a_path_that_matches_nothing_is_an_error_with_its_value(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.txt").write_text("there")
    with pytest.raises(ConfigError, match=r"data\.paths: .* matches no file") as error:
        read_corpus((str(tmp_path / "there.txt"), str(tmp_path / pattern)))
    assert pattern in str(error.value)


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"data\.paths=.*no usable text.*empty\.txt: empty"):
        read_corpus((str(tmp_path),))


def test_a_file_name_that_is_not_utf8_can_be_reported(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"text")
    (document,) = read_corpus((str(tmp_path),)).documents
    assert document.name.endswith("caf\\xe9.txt")
    assert "".join(document.pieces()) == "text"


def test_the_fingerprint_follows_names_and_contents_only(tmp_path):
    def fingerprint(folder: str, **files: str) -> str:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for name, text in files.items():
            (root / name).write_text(text)
        return read_corpus((str(root),)).fingerprint

    first = fingerprint("x", a="1", b="2")
    (tmp_path / "x" / "a").touch()
    assert fingerprint("x") == first
    assert fingerprint("x", b="3") != first
    assert fingerprint("x", a="2", b="1") != first


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1), piece_bytes=st.integers(4, 40))
def test_the_pieces_of_a_document_make_up_its_text(tmp_path_factory, text, piece_bytes):
    path = tmp_path_factory.mktemp("pieces") / "text"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_BYTES", piece_bytes)
        (document,) = read_corpus((str(path),)).documents
        pieces = list(document.pieces())
    assert "".join(pieces) == text
    assert document.size_bytes == len(text.encode())
    assert all(len(piece.encode()) <= 2 * piece_bytes + 3 for piece in pieces)


def test_pieces_end_with_a_line(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("0123456\n" * 20)
    monkeypatch.setattr(corpus, "PIECE_BYTES", 50)
    (document,) = read_corpus((str(path),)).documents
    pieces = list(document.pieces())
    assert len(pieces) > 1
    assert all(piece.endswith("\n") for piece in pieces)


def test_line_ends_are_kept_as_they_are(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfdos\r\nmac\runix\n\x00")
    (document,) = read_corpus((str(path),)).documents
    assert "".join(document.pieces()) == "\ufeffdos\r\nmac\runix\n\x00"


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_a_file_that_changes_between_check_and_use_is_an_error(tmp_path, change):
    path = tmp_path / "text"
    path.write_text("text")
    (document,) = read_corpus((str(path),)).documents
    if change == "gone":
        path.unlink()
    else:
        path.write_text("longer text")
    with pytest.raises(ConfigError, match=r"data\.paths: .*text changed"):
        list(document.pieces())
