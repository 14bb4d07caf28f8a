"""Files of ``configs/``: those in the repository, and those that are wrong."""

from pathlib import Path

import pytest

from dsjax.config import ConfigError, RunConfig
from dsjax.config.config_file import load_file, titles

_REPOSITORY = Path(__file__).parents[3]


def test_every_config_of_the_repository_is_one_that_runs(monkeypatch):
    monkeypatch.chdir(_REPOSITORY)
    files = titles()
    assert "configs/tiny.py" in files
    for path, title in files.items():
        assert title, f"{path} has no docstring"
        load_file(path).check()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", r"has no function get_config\(\) that returns a RunConfig: add one"),
        ("get_config = 3", r"has no function get_config\(\)"),
        ("def get_config(:\n  pass", r"is not Python: .* in line 1$"),
        (
            "\nimport no_such_module",
            r"raises ModuleNotFoundError \(No module named 'no_such_module'\) in line 2$",
        ),
        ("\n\ndef get_config():\n    return {}['lr']", r"get_config\(\) raises KeyError \('lr'\) in line 4$"),
        ("def get_config():\n    raise ValueError('a\\nb')", r"raises ValueError \(a b\) in line 2$"),
        ("def get_config():\n    open('nothing')", r"raises FileNotFoundError .* in line 2$"),
        ("def get_config():\n    assert False", r"get_config\(\) raises AssertionError in line 2$"),
        ("def get_config(name):\n    pass", r"raises TypeError .* in line \?$"),
        ("def get_config():\n    pass", r"get_config\(\) returns a NoneType: it must return a RunConfig$"),
        (
            "from dsjax.config import RunConfig\ndef get_config():\n    return RunConfig().freeze()",
            r"returns a frozen RunConfig: leave out freeze\(\)$",
        ),
        (
            "from dsjax.config import RunConfig\ndef get_config():\n    return RunConfig(lr=1)",
            r"raises TypeError .*'lr'.* in line 3$",
        ),
        (
            "from dsjax.config import RunConfig, TrainConfig\n"
            "def get_config():\n    return RunConfig(train=TrainConfig(steps=1e3))",
            r"train.steps=1000.0 must be a whole number$",
        ),
        (
            "from dsjax.config import RunConfig\ndef get_config():\n    return RunConfig(train=3)",
            r"train=3 must be a TrainConfig$",
        ),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, source, message):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=message) as caught:
        load_file(str(path))
    assert str(caught.value).startswith(f"--config={path}")
    assert "\n" not in str(caught.value)


def test_a_folder_names_the_files_in_it(tmp_path):
    (tmp_path / "one.py").touch()
    with pytest.raises(ConfigError, match=r"one\.py$"):
        load_file(str(tmp_path))


def test_a_path_may_hold_colons_and_spaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "at 12:30 h.py"
    path.write_text("from dsjax.config import RunConfig\nget_config = RunConfig\n")
    assert load_file(str(path)) == RunConfig()
    assert list(tmp_path.iterdir()) == [path]
