"""From text to a folder of tokens: what is in it, and that it is there whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsjax.config import ConfigError, DataConfig
from dsjax.data import corpus, preparation, prepare, store
from dsjax.data.store import TokenStore
from dsjax.data.tokenizer import Tokenizer, train_tokenizer

VOCAB = 300


def quiet(line: str) -> None:
    pass


def write_texts(folder: Path, count: int = 60) -> list[str]:
    """Documents of different words and lengths, as ``config_of`` reads them."""
    texts = [
        f"document {number} says {'é中 ' * (number % 7)}\n" * (1 + number % 5) for number in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return texts


def config_of(folder: Path, **changes) -> DataConfig:
    return DataConfig(**{"paths": (str(folder),), "heldout_fraction": 0.2, **changes})


def documents_of(tokenizer: Tokenizer, tokens: TokenStore) -> list[str]:
    """The texts of a store, after checking that each stands between its BOS and EOS."""
    assert tokens.tokens.dtype == np.uint32
    assert tokens.document_starts.dtype == np.int64
    texts = []
    for ids in np.split(tokens.tokens, tokens.document_starts[1:]):
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.control_ids.isdisjoint(ids[1:-1].tolist())
        texts.append(tokenizer.decode(ids[1:-1]))
    return texts


def test_every_document_is_in_one_store_whole(tmp_path):
    texts = write_texts(tmp_path / "text")
    data = prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    training, heldout = (documents_of(data.tokenizer, side) for side in (data.train, data.heldout))
    assert sorted(training + heldout) == sorted(texts)
    assert len(heldout) > 1
    in_name_order = [text for text in texts if text in training]
    assert training != in_name_order


def test_the_manifest_accounts_for_everything(tmp_path):
    texts = write_texts(tmp_path / "text")
    (tmp_path / "text" / "bad.txt").write_bytes(b"\xff")
    data = prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert manifest == data.manifest
    assert sum(manifest["documents"].values()) == len(texts)
    assert sum(manifest["bytes"].values()) == sum(len(text.encode()) for text in texts)
    assert manifest["tokens"] == {"train": len(data.train.tokens), "heldout": len(data.heldout.tokens)}
    assert [item["name"].endswith("bad.txt") for item in manifest["skipped"]] == [True]
    assert manifest["skipped"][0]["reason"].startswith("not UTF-8")
    assert re.fullmatch("[0-9a-f]{32}", manifest["fingerprint"])


def test_the_log_says_what_was_skipped_and_how_much_there_is(tmp_path):
    write_texts(tmp_path / "text")
    for number in range(8):
        (tmp_path / "text" / f"bad{number}.txt").touch()
    lines: list[str] = []
    prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path, log=lines.append)
    text = "\n".join(lines)
    assert "60 documents" in text
    assert text.count(": empty") == 5
    assert "skipped 3 more" in text
    assert "training tokens" in lines[-1]


def test_long_tokenising_reports_progress(tmp_path, monkeypatch):
    write_texts(tmp_path / "text")
    monkeypatch.setattr(preparation, "_PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path, log=lines.append)
    assert any(re.fullmatch(r"data: tokenised (\S+ MB) of \1 \(train\)", line) for line in lines)


def test_the_second_time_the_text_is_not_needed(tmp_path):
    write_texts(tmp_path / "text")
    config = config_of(tmp_path / "text")
    first = prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    shutil.rmtree(tmp_path / "text")
    # isolate_documents is applied to batches, not to what is stored.
    config.isolate_documents = True
    second = prepare(config, vocab_size=VOCAB, workdir=str(tmp_path / "run"), log=quiet)
    assert isinstance(second.train.tokens, np.memmap)
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert np.array_equal(first.heldout.tokens, second.heldout.tokens)
    assert second.tokenizer.decode([20, 30]) == first.tokenizer.decode([20, 30])


def test_two_workdirs_hold_the_same(tmp_path):
    write_texts(tmp_path / "text")
    one, two = (
        prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / run, log=quiet)
        for run in ("one", "two")
    )
    assert np.array_equal(one.train.tokens, two.train.tokens)
    assert np.array_equal(one.heldout.tokens, two.heldout.tokens)
    assert one.manifest == two.manifest


@pytest.mark.parametrize(
    ("field", "change", "vocab_size"),
    [
        ("data.paths", {"paths": ("elsewhere",)}, VOCAB),
        ("data.tokenizer", {"tokenizer": "other.json"}, VOCAB),
        ("data.heldout_fraction", {"heldout_fraction": 0.3}, VOCAB),
        ("model.vocab_size", {}, 512),
    ],
)
def test_another_config_for_the_same_workdir_is_an_error(tmp_path, field, change, vocab_size):
    write_texts(tmp_path / "text")
    prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    with pytest.raises(ConfigError, match="another workdir") as error:
        prepare(
            config_of(tmp_path / "text", **change), vocab_size=vocab_size, workdir=tmp_path / "run", log=quiet
        )
    assert str(error.value).startswith(f"{field}=")
    wanted = next(iter(change.values())) if change else vocab_size
    assert repr(wanted[0] if isinstance(wanted, tuple) else wanted) in str(error.value)
    assert "was prepared with" in str(error.value)


def test_a_loaded_tokenizer_is_used_and_kept(tmp_path):
    texts = write_texts(tmp_path / "text")
    train_tokenizer(texts, 280).save(tmp_path / "given.json")
    config = config_of(tmp_path / "text", tokenizer=str(tmp_path / "given.json"))
    data = prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    assert data.tokenizer.vocab_size == 280
    assert (tmp_path / "run/data/tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()
    with pytest.raises(ConfigError, match=r"model\.vocab_size=270 .*280 ids"):
        prepare(config, vocab_size=270, workdir=tmp_path / "small", log=quiet)


def test_one_small_file_is_enough_to_prepare(tmp_path):
    (tmp_path / "poem.txt").write_text("a line\n" * 20)
    config = DataConfig(paths=(str(tmp_path / "poem.txt"),))
    data = prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    (head,), (tail,) = (documents_of(data.tokenizer, side) for side in (data.train, data.heldout))
    assert head + tail == "a line\n" * 20


def test_a_long_document_is_tokenised_in_pieces_and_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 64)
    monkeypatch.setattr(store, "_BATCH_BYTES", 150)
    texts = write_texts(tmp_path / "text")
    data = prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    stored = documents_of(data.tokenizer, data.train) + documents_of(data.tokenizer, data.heldout)
    assert sorted(stored) == sorted(texts)


def leftovers(workdir: Path) -> list[str]:
    return sorted(path.name for path in workdir.iterdir() if path.name.startswith(".data-"))


def test_a_killed_process_leaves_nothing_that_is_taken_for_data(tmp_path):
    write_texts(tmp_path / "text")
    workdir = tmp_path / "run"
    program = (
        "import os, sys; from dsjax.data import prepare; from dsjax.config import DataConfig\n"
        "config = DataConfig(paths=(sys.argv[1],), heldout_fraction=0.2)\n"
        "end = lambda line: os._exit(9) if 'prepared in' in line else None\n"
        "prepare(config, vocab_size=300, workdir=sys.argv[2], log=end)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "text"), str(workdir)]
    assert subprocess.run(arguments, check=False).returncode == 9
    (left,) = leftovers(workdir)
    assert not (workdir / "data").exists()
    long_ago = time.time() - 7200
    for path in (workdir / left, *(workdir / left).iterdir()):
        os.utime(path, (long_ago, long_ago))
    data = prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=workdir, log=quiet)
    assert len(data.train.tokens)
    assert leftovers(workdir) == []


def test_the_folder_of_a_process_at_work_is_left_alone(tmp_path):
    write_texts(tmp_path / "text")
    at_work = tmp_path / "run" / ".data-0123456789ab"
    at_work.mkdir(parents=True)
    (at_work / "train_tokens.npy").write_bytes(b"half")
    long_ago = time.time() - 7200
    os.utime(at_work, (long_ago, long_ago))  # its files are recent
    prepare(config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    assert leftovers(tmp_path / "run") == [at_work.name]


def test_an_interrupted_preparation_cleans_up_and_can_be_repeated(tmp_path, monkeypatch):
    write_texts(tmp_path / "text")

    def interrupted(folder, side, *rest):
        if side == "heldout":
            raise KeyboardInterrupt
        store.write_store(folder, side, *rest)

    config = config_of(tmp_path / "text")
    monkeypatch.setattr(preparation, "write_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.undo()
    prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)


def test_two_processes_may_prepare_at_a_time(tmp_path):
    write_texts(tmp_path / "text")
    config = config_of(tmp_path / "text")

    def overtaken(line: str) -> None:
        if "prepared in" in line and not (tmp_path / "run" / "data").exists():
            prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)

    data = prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=overtaken)
    assert len(data.train.tokens) == data.manifest["tokens"]["train"]
    assert leftovers(tmp_path / "run") == []


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"made_by": "something else"}'])
def test_a_data_folder_of_another_kind_is_not_touched(tmp_path, manifest):
    texts = write_texts(tmp_path / "data")
    if manifest is not None:
        (tmp_path / "data" / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match=r"holds something else .*use another workdir"):
        prepare(config_of(tmp_path / "data"), vocab_size=VOCAB, workdir=tmp_path, log=quiet)
    assert len(list((tmp_path / "data").glob("*.txt"))) == len(texts)


@pytest.mark.parametrize("harm", ["short tokens", "no tokens", "no tokenizer", "fewer tokens"])
def test_a_damaged_folder_is_an_error_that_says_what_to_do(tmp_path, harm):
    write_texts(tmp_path / "text")
    config = config_of(tmp_path / "text")
    prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    tokens = tmp_path / "run/data/train_tokens.npy"
    if harm == "short tokens":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif harm == "no tokens":
        tokens.write_bytes(b"")
    elif harm == "no tokenizer":
        (tmp_path / "run/data/tokenizer.json").unlink()
    else:
        np.save(tokens, np.zeros(5, np.uint32))
    with pytest.raises(ConfigError, match=r"is damaged .*delete it"):
        prepare(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
