"""Configurations as JSON, as text, and their types."""

import copy
import json
from typing import Any

import pytest

from dsjax.config import ConfigError, ModelConfig, RunConfig, describe, from_dict, presets, to_dict
from dsjax.config.fields import check_types, comments, walk


def small_run() -> RunConfig:
    run = RunConfig(model=presets.v32_tiny())
    run.train.sequence_length = 256
    run.data.paths = ("my notes.txt", "b")
    return run


def test_json_round_trip():
    run = small_run()
    again = from_dict(json.loads(json.dumps(to_dict(run))))
    assert again == run
    assert again.data.paths == ("my notes.txt", "b")
    assert again.frozen
    assert again.model.rope_scaling.frozen
    assert hash(again) == hash(run)


def change(data: dict[str, Any], path: str, value: Any) -> None:
    *rooms, name = path.split(".")
    for room in rooms:
        data = data[room]
    if value is None:
        del data[name]
    else:
        data[name] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.stesp", 1, r"^train\.stesp is no field of this version"),
        ("zebra", 1, r"^zebra is no field of this version"),
        ("train.steps", None, r"^train\.steps is missing"),
        ("model.rope_scaling", None, r"^model\.rope_scaling is missing"),
        ("train", 3, r"^train=3 must be a dictionary"),
        ("train.steps", "10", r"^train\.steps='10' must be a whole number"),
        ("train.steps", True, r"^train\.steps=True must be a whole number"),
        ("log.tensorboard", 1, r"^log\.tensorboard=1 must be true or false"),
        ("optimizer.moment_dtype", "int8", r"='int8' must be one of float32, bfloat16"),
        ("data.paths", "a.txt", r"^data\.paths='a.txt' must be a tuple of strings"),
        ("data.paths", [1], r"^data\.paths=\(1,\) must be a tuple of strings"),
        ("optimizer.lr", float("inf"), r"^optimizer\.lr=inf must be a finite number"),
        ("train.sequence_length", 5000, r"^train\.sequence_length=5000"),
    ],
)
def test_a_wrong_record_is_named(path, value, message):
    data = copy.deepcopy(to_dict(small_run()))
    change(data, path, value)
    with pytest.raises(ConfigError, match=message):
        from_dict(data)


def test_describe_marks_what_the_command_line_changed():
    base, run = small_run(), small_run()
    run.train.steps = 7
    run.model.rope_scaling.factor = 20.0
    lines = describe(run, base).splitlines()
    assert [line for line in lines if line.startswith("*")] == [
        "*     factor = 20.0  (was 40.0)",
        "*   steps = 7  (was 1000)",
    ]
    assert "    rope_scaling" in lines
    assert "  seed = 0" in lines
    assert len([line for line in lines if " = " in line]) == len(list(walk(run)))


def test_describe_without_a_base_marks_what_differs_from_the_defaults():
    assert "*   hidden_size = 128  (was 7168)" in describe(small_run())
    assert "*" not in describe(RunConfig())


def test_every_field_is_documented():
    undocumented = [field.path for field in walk(RunConfig()) if not field.comment]
    assert undocumented == []


def test_a_heading_documents_no_field():
    assert comments(ModelConfig)["num_attention_heads"].startswith("Query heads")
    assert comments(ModelConfig)["rope_scaling"] == ""


def test_whole_numbers_fit_where_numbers_do():
    run = small_run()
    run.optimizer.lr = 1
    check_types(run)
    run.check()


def test_frozen_stays_frozen_in_copies():
    run = small_run().freeze()
    with pytest.raises(AttributeError, match="steps cannot change any more"):
        copy.deepcopy(run).train.steps = 3
