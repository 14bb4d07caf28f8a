"""The data of a run: one set made in the workdir, or sets that were prepared before."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsjax.config import ConfigError, DataConfig
from dsjax.data import run_data
from dsjax.data.engines import run_here
from dsjax.data.preparation import prepare_set
from dsjax.data.prepared_set import PreparedSet, open_set
from dsjax.data.run_data import RunData, data_of_run
from dsjax.data.settings import Settings
from dsjax.data.stages import STAGES
from dsjax.data.token_set import TokenSet
from dsjax.data.tokenizer import Tokenizer, train_tokenizer

VOCAB = 300


def quiet(line: str) -> None:
    pass


def write_texts(folder: Path, count: int = 60) -> list[str]:
    """Documents of different words and lengths."""
    texts = [f"document {n} says {'é中 ' * (n % 7)}\n" * (1 + n % 5) for n in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return texts


def config_of(folder: Path, **changes) -> DataConfig:
    return DataConfig(**{"paths": (str(folder),), "heldout_fraction": 0.2, **changes})


def prepared(folder: Path, workdir: Path, *, vocab_size: int = VOCAB, log=quiet, **changes) -> RunData:
    return data_of_run(config_of(folder, **changes), vocab_size=vocab_size, workdir=workdir, log=log)


def texts_of(tokenizer: Tokenizer, documents: TokenSet) -> list[str]:
    found = []
    for number, length in enumerate(documents.lengths.tolist()):
        ids = documents.text(number, 0, length)
        assert tokenizer.control_ids.isdisjoint(ids.tolist())
        found.append(tokenizer.decode(ids))
    return found


def sides_of(data: RunData) -> tuple[list[str], list[str]]:
    (only,) = data.sets
    return texts_of(data.tokenizer, only.train), texts_of(data.tokenizer, only.heldout)


def test_every_document_is_on_one_side_whole(tmp_path):
    texts = write_texts(tmp_path / "text")
    training, heldout = sides_of(prepared(tmp_path / "text", tmp_path / "run"))
    assert sorted(training + heldout) == sorted(texts)
    assert len(heldout) > 1


def test_the_manifest_accounts_for_everything(tmp_path):
    texts = write_texts(tmp_path / "text")
    (tmp_path / "text" / "bad.txt").write_bytes(b"\xff")
    (only,) = prepared(tmp_path / "text", tmp_path / "run").sets
    counts = only.manifest["counts"]
    whole = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    for step in ("read", "filtered", "without_exact_duplicates"):
        assert counts[step] == whole
    for name in whole:
        assert counts["train"][name] + counts["heldout"][name] == whole[name]
    for side, documents in (("train", only.train), ("heldout", only.heldout)):
        assert counts[side]["tokens"] == documents.lengths.sum()
        assert counts[side]["documents"] == len(documents.lengths)
    assert {reason: count for reason, count in only.manifest["rejected"].items() if count} == {"not UTF-8": 1}
    (reject,) = map(json.loads, (only.folder / "rejects.jsonl").read_text().splitlines())
    assert reject["name"].endswith("bad.txt")


def test_the_log_says_what_was_left_out_and_how_much_there_is(tmp_path):
    write_texts(tmp_path / "text")
    for number in range(8):
        (tmp_path / "text" / f"bad{number}.txt").touch()
    lines: list[str] = []
    prepared(tmp_path / "text", tmp_path / "run", log=lines.append)
    text = "\n".join(lines)
    assert "68 documents" in text
    assert "left out 8: empty, such as " in text
    assert "bad0.txt" in text
    assert "training tokens" in lines[-1]


def test_long_work_reports_progress(tmp_path, monkeypatch):
    write_texts(tmp_path / "text")
    monkeypatch.setattr(run_data, "_PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    prepared(tmp_path / "text", tmp_path / "run", log=lines.append)
    assert any(line.startswith("data: reading and filtering, 0.0 of 0.0 MB") for line in lines)
    assert any(line.startswith("data: tokenising, ") for line in lines)


def test_the_second_time_the_text_is_not_needed(tmp_path):
    write_texts(tmp_path / "text")
    first = prepared(tmp_path / "text", tmp_path / "run")
    shutil.rmtree(tmp_path / "text")
    # How documents are packed is decided by batches, not by what is stored.
    second = prepared(
        tmp_path / "text", tmp_path / "run", isolate_documents=True, packing="whole", fim_rate=0.5
    )
    assert sides_of(second) == sides_of(first)
    assert second.fingerprint == first.fingerprint


def test_two_workdirs_hold_the_same_and_other_text_something_else(tmp_path):
    write_texts(tmp_path / "text")
    one, two = (prepared(tmp_path / "text", tmp_path / run) for run in ("one", "two"))
    assert one.sets[0].manifest == two.sets[0].manifest
    write_texts(tmp_path / "text", 61)
    assert prepared(tmp_path / "text", tmp_path / "three").fingerprint != one.fingerprint


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
    prepared(tmp_path / "text", tmp_path / "run")
    with pytest.raises(ConfigError, match="another folder") as error:
        prepared(tmp_path / "text", tmp_path / "run", vocab_size=vocab_size, **change)
    assert str(error.value).startswith(f"{field}=")
    wanted = next(iter(change.values())) if change else vocab_size
    assert repr(wanted[0] if isinstance(wanted, tuple) else wanted) in str(error.value)
    assert "was prepared with" in str(error.value)


def test_a_given_tokenizer_is_used_and_kept(tmp_path):
    texts = write_texts(tmp_path / "text")
    train_tokenizer(texts, 280).save(tmp_path / "given.json")
    data = prepared(tmp_path / "text", tmp_path / "run", tokenizer=str(tmp_path / "given.json"))
    assert data.tokenizer.vocab_size == 280
    assert (tmp_path / "run/data/tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()
    with pytest.raises(ConfigError, match=r"model\.vocab_size=270 .*280 ids"):
        prepared(
            tmp_path / "text", tmp_path / "small", vocab_size=270, tokenizer=str(tmp_path / "given.json")
        )


def test_the_tokenizer_of_the_weights_is_used_and_another_one_refused(tmp_path):
    texts = write_texts(tmp_path / "text")
    train_tokenizer(texts, 280).save(tmp_path / "kept.json")
    options = {"vocab_size": VOCAB, "workdir": tmp_path / "run", "log": quiet}
    data = data_of_run(config_of(tmp_path / "text"), tokenizer=tmp_path / "kept.json", **options)
    assert data.tokenizer.vocab_size == 280
    train_tokenizer(texts, 290).save(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match="another tokenizer than"):
        data_of_run(config_of(tmp_path / "text"), tokenizer=tmp_path / "kept.json", **options)


def test_one_small_file_is_enough(tmp_path):
    (tmp_path / "poem.txt").write_text("a line\n" * 20)
    (head,), (tail,) = sides_of(prepared(tmp_path / "poem.txt", tmp_path / "run", heldout_fraction=0.02))
    assert head + tail == "a line\n" * 20


@pytest.mark.parametrize("content", ["", "x"])
def test_text_of_no_use_is_an_error_after_which_other_text_is_taken(tmp_path, content):
    (tmp_path / "poem.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"no usable text in .*poem\.txt"):
        prepared(tmp_path / "poem.txt", tmp_path / "run")
    write_texts(tmp_path / "text")
    assert sides_of(prepared(tmp_path / "text", tmp_path / "run"))


def test_a_killed_process_leaves_nothing_that_is_taken_for_data(tmp_path):
    write_texts(tmp_path / "text")
    program = (
        "import os, sys; from dsjax.data import engines, run_data; from dsjax.config import DataConfig\n"
        "stages = engines.STAGES\n"
        "engines.STAGES = (*stages[:-1], stages[-1]._replace(run=lambda plan, task, report: os._exit(9)))\n"
        "config = DataConfig(paths=(sys.argv[1],), heldout_fraction=0.2)\n"
        "run_data.data_of_run(config, vocab_size=300, workdir=sys.argv[2])"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "text"), str(tmp_path / "run")]
    assert subprocess.run(arguments, check=False).returncode == 9
    assert not (tmp_path / "run/data/manifest.json").exists()
    kept = (tmp_path / "run/data/tokenizer.json").stat().st_mtime_ns
    data = prepared(tmp_path / "text", tmp_path / "run")
    assert (tmp_path / "run/data/tokenizer.json").stat().st_mtime_ns == kept
    assert data.sets[0].manifest == prepared(tmp_path / "text", tmp_path / "undisturbed").sets[0].manifest


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"made_by": "something else"}'])
def test_a_data_folder_of_another_kind_is_not_touched(tmp_path, manifest):
    texts = write_texts(tmp_path / "data")
    if manifest is not None:
        (tmp_path / "data" / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match=r"(holds something else|is not that of a prepared set) .*another"):
        prepared(tmp_path / "data", tmp_path)
    assert len(list((tmp_path / "data").glob("*.txt"))) == len(texts)
    assert not (tmp_path / "data" / "work").exists()


@pytest.mark.parametrize(
    "harm", ["short shard", "no shard", "no tokenizer", "fewer tokens", "no lengths", "other tokenizer"]
)
def test_a_damaged_set_is_an_error_that_says_what_to_do(tmp_path, harm):
    write_texts(tmp_path / "text")
    prepared(tmp_path / "text", tmp_path / "run")
    folder = tmp_path / "run/data"
    shard, lengths = folder / "train-00000.array_record", folder / "train-00000.lengths.npy"
    if harm == "short shard":
        os.truncate(shard, shard.stat().st_size // 2)
    elif harm == "no shard":
        shard.unlink()
    elif harm == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif harm == "other tokenizer":
        train_tokenizer(["other text " * 50], 290).save(folder / "tokenizer.json")
    elif harm == "fewer tokens":
        stored = np.load(lengths)
        stored[0] -= 1
        np.save(lengths, stored)
    else:
        lengths.unlink()
    with pytest.raises(ConfigError, match=r"is damaged .*delete it"):
        prepared(tmp_path / "text", tmp_path / "run")


def test_damage_within_a_shard_is_told_when_it_is_read(tmp_path):
    write_texts(tmp_path / "text")
    data = prepared(tmp_path / "text", tmp_path / "run")
    shard = tmp_path / "run/data/train-00000.array_record"
    content = bytearray(shard.read_bytes())
    content[1000:3000] = bytes(2000)
    shard.write_bytes(content)
    (only,) = data_of_run(
        config_of(tmp_path / "text"), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet
    ).sets
    with pytest.raises(ConfigError, match=r"run/data is damaged .*delete it"):
        texts_of(data.tokenizer, only.train)


@pytest.mark.parametrize(
    "name", ["clean-00000.array_record", "clean-00000.npz", "clean-00000.json", "sides.npz"]
)
def test_a_damaged_file_of_interrupted_work_is_told(tmp_path, name):
    write_texts(tmp_path / "text")

    def half(plan):
        for stage in STAGES[:3]:
            stage.run(plan, 0, lambda size: None)
        path = plan.work / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise KeyboardInterrupt

    settings = Settings(
        inputs=(str(tmp_path / "text"),), quality="none", keep_near_duplicates=True, vocab_size=VOCAB
    )
    with pytest.raises(KeyboardInterrupt):
        prepare_set(tmp_path / "set", settings, half)
    with pytest.raises(
        ConfigError, match=r"work/(clean-00000|sides) is damaged .*: delete .*/set to begin again"
    ):
        prepare_set(tmp_path / "set", settings, lambda plan: run_here(plan, run_data._watch(quiet)))


def test_a_workdir_of_sets_is_told_from_one_of_text(tmp_path):
    write_texts(tmp_path / "text")
    make_set(tmp_path / "a", tmp_path / "text")
    data_of_run(
        DataConfig(sets=(str(tmp_path / "a"),)), vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet
    )
    with pytest.raises(ConfigError, match=r"run/data is of a run on data\.sets: name them again"):
        prepared(tmp_path / "text", tmp_path / "run")


# ---------------------------------------------------------------- sets that were prepared before


def make_set(folder: Path, text: Path, **changes) -> PreparedSet:
    settings = Settings(
        **{
            "inputs": (str(text),),
            "quality": "none",
            "keep_near_duplicates": True,
            "vocab_size": VOCAB,
            **changes,
        }
    )
    prepare_set(folder, settings, lambda plan: run_here(plan, run_data._watch(quiet)))
    return open_set(folder)


def test_a_run_takes_sets_with_their_weights(tmp_path):
    write_texts(tmp_path / "text")
    make_set(tmp_path / "a", tmp_path / "text")
    make_set(tmp_path / "b=c", tmp_path / "text", tokenizer=str(tmp_path / "a/tokenizer.json"), seed=1)
    config = DataConfig(sets=(f"{tmp_path}/a=3", f"{tmp_path}/b=c=0.5"))
    config.check()
    data = data_of_run(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)
    assert [part.folder for part in data.sets] == [tmp_path / "a", tmp_path / "b=c"]
    assert data.weights == (3.0, 0.5)
    assert (tmp_path / "run/data/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    other = DataConfig(sets=(f"{tmp_path}/a=3", f"{tmp_path}/b=c=1"))
    assert (
        data_of_run(other, vocab_size=VOCAB, workdir=tmp_path / "x", log=quiet).fingerprint
        != data.fingerprint
    )


def test_sets_of_different_tokenizers_are_refused(tmp_path):
    write_texts(tmp_path / "text")
    make_set(tmp_path / "a", tmp_path / "text")
    make_set(tmp_path / "b", tmp_path / "text", vocab_size=280)
    config = DataConfig(sets=(str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(ConfigError, match=r"data\.sets: .* different tokenizers"):
        data_of_run(config, vocab_size=VOCAB, workdir=tmp_path / "run", log=quiet)


def test_a_set_must_fit_the_model_and_exist(tmp_path):
    write_texts(tmp_path / "text")
    make_set(tmp_path / "a", tmp_path / "text")
    config = DataConfig(sets=(str(tmp_path / "a"),))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=280"):
        data_of_run(config, vocab_size=280, workdir=tmp_path / "run", log=quiet)
    with pytest.raises(ConfigError, match=r"nothing/manifest\.json is not that of a prepared set .*prepare"):
        data_of_run(DataConfig(sets=(f"{tmp_path}/nothing",)), vocab_size=300, workdir=tmp_path, log=quiet)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sets": ("a=0",)}, r"'a=0' must be a folder, or FOLDER=SHARE"),
        ({"sets": ("a=-1",)}, "'a=-1' must be"),
        ({"sets": ("a=much",)}, "'a=much' must be"),
        ({"sets": ("=1",)}, "'=1' must be"),
        ({"sets": ("a=nan",)}, "'a=nan' must be"),
        ({"sets": ("a=1", "b=1e-9")}, "'b' has 1e-09 of 1, and less than 0.0001 of all comes to nothing"),
        ({"sets": ("a=1e308", "b=1e308")}, "'a' has 1e.308 of inf"),
        ({"sets": ("a",), "paths": ("b",)}, r"data\.sets=.* and data\.paths=.* are both given"),
        ({"sets": ("a",), "tokenizer": "b"}, r"data\.sets=.* and data\.tokenizer='b' are both given"),
        ({"fim_rate": 1.5}, r"data\.fim_rate=1\.5 must lie in \[0, 1\]"),
    ],
)
def test_fields_that_cannot_be_used(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields).check()
