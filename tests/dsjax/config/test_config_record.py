"""Configurations as JSON, and their types."""

import copy
import functools
import json

import pytest

from dsjax.config import ConfigError, ModelConfig, RunConfig, presets, to_dict
from dsjax.config.fields import check_types, comments, walk


def small_run() -> RunConfig:
    run = RunConfig(model=presets.v32_tiny())
    run.train.sequence_length = 256
    run.data.paths = ("my notes.txt", "b")
    return run


def test_the_record_is_json_with_every_field():
    record = json.loads(json.dumps(to_dict(small_run())))
    assert record["data"]["paths"] == ["my notes.txt", "b"]
    for field in walk(small_run()):
        found = record
        for name in field.path.split("."):
            found = found[name]
        assert found == (list(field.value) if isinstance(field.value, tuple) else field.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.steps", "10", r"^train\.steps='10' must be a whole number"),
        ("train.steps", True, r"^train\.steps=True must be a whole number"),
        ("log.tensorboard", 1, r"^log\.tensorboard=1 must be true or false"),
        ("optimizer.moment_dtype", "int8", r"='int8' must be one of float32, bfloat16"),
        ("data.paths", "a.txt", r"^data\.paths='a.txt' must be a tuple of strings"),
        ("data.paths", (1,), r"^data\.paths=\(1,\) must be a tuple of strings"),
        ("optimizer.lr", float("inf"), r"^optimizer\.lr=inf must be a finite number"),
        ("train.sequence_length", 5000, r"^train\.sequence_length=5000"),
    ],
)
def test_a_wrong_value_is_named(path, value, message):
    run = small_run()
    *rooms, name = path.split(".")
    setattr(functools.reduce(getattr, rooms, run), name, value)
    with pytest.raises(ConfigError, match=message):
        run.check()


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
