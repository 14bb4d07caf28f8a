"""Whose folder it is: the same run goes on, another one is refused by name."""

import dataclasses
import json

import pytest
from small_run import small_run

from dsjax.checkpoint.workdir import claim, held, remember_text
from dsjax.config import ConfigError


def changed(config, **rooms):
    copy = dataclasses.replace(config)
    for room, fields in rooms.items():
        setattr(copy, room, dataclasses.replace(getattr(config, room), **fields))
    return copy


def begun(workdir) -> None:
    """A run that has saved something."""
    claim(small_run(), workdir)
    (workdir / "checkpoints" / "10").mkdir(parents=True)


def test_before_the_first_checkpoint_a_mistyped_field_can_be_corrected(tmp_path):
    claim(changed(small_run(), data={"paths": ("mistyped",)}), tmp_path)
    assert claim(small_run(), tmp_path) == []


def test_the_same_run_goes_on(tmp_path):
    begun(tmp_path)
    assert claim(small_run(), tmp_path) == []


def test_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with held(folder), pytest.raises(ConfigError, match="in use by another"), held(folder):
        pass
    with held(folder):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file/run cannot be made or written"),
        held(tmp_path / "file" / "run"),
    ):
        pass


def test_a_run_keeps_its_text(tmp_path):
    remember_text("a", tmp_path)
    remember_text("b", tmp_path)
    begun(tmp_path)
    remember_text("b", tmp_path)
    with pytest.raises(ConfigError, match="other text than the run began with"):
        remember_text("c", tmp_path)


def test_what_may_change_is_listed_and_kept(tmp_path):
    begun(tmp_path)
    longer = changed(small_run(), train={"steps": 2000}, model={"remat": "full"})
    assert sorted(claim(longer, tmp_path)) == ["model.remat: none -> full", "train.steps: 1000 -> 2000"]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 2000


def test_what_to_write_instead_can_be_pasted(tmp_path):
    begun(tmp_path)
    wanted = r"use --config\.optimizer\.moment_dtype=float32,"
    with pytest.raises(ConfigError, match=wanted):
        claim(changed(small_run(), optimizer={"moment_dtype": "bfloat16"}), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    claim(changed(small_run(), data={"paths": ("a b.txt", "c")}), other)
    (other / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"use --config\.data\.paths=a b\.txt,c,"):
        claim(small_run(), other)


def test_weights_without_a_run_are_left_alone(tmp_path):
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"--config.init.checkpoint={tmp_path} and another --workdir"):
        claim(small_run(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("room", "field", "value"),
    [
        ("model", "hidden_size", 64),
        ("data", "paths", ("other",)),
        ("train", "batch_size", 3),
        ("train", "sequence_length", 7),
        ("optimizer", "moment_dtype", "bfloat16"),
    ],
)
def test_another_model_or_other_data_is_refused_and_nothing_overwritten(tmp_path, room, field, value):
    begun(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"{room}\.{field}=.*differs.*new --workdir"):
        claim(changed(small_run(), **{room: {field: value}}), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_file_is_named(tmp_path, text):
    begun(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not readable JSON"):
        claim(small_run(), tmp_path)
