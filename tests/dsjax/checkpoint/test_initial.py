"""What a run does with the weights that ``init`` names before it reads them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from flax import nnx
from replica import SMALL_CONFIG, SMALL_CONFIG_V3, write_random

from dsjax.checkpoint.hf_config import read_config, with_new_indexer
from dsjax.checkpoint.hf_import import import_checkpoint
from dsjax.checkpoint.initial import initial_model, kept_tokenizer, open_initial
from dsjax.config import ConfigError, InitConfig, RunConfig
from dsjax.models.transformer import Transformer


@pytest.fixture
def hf(tmp_path) -> Path:
    write_random(tmp_path / "source", SMALL_CONFIG)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


@pytest.fixture
def workdir(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def run_of(folder: Path, **init) -> RunConfig:
    """A run of the model in ``folder``."""
    came = folder if (folder / "config.json").exists() else folder / "hf"
    return RunConfig(model=read_config(came).model, init=InitConfig(**init))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_came_is_kept_and_replaced_by_what_comes_next(hf, workdir):
    run = run_of(hf, hf=str(hf))
    open_initial(run, workdir)
    assert names(workdir / "hf") == ["config.json", "tokenizer.json"]
    assert kept_tokenizer(workdir) == workdir / "hf" / "tokenizer.json"
    (hf / "tokenizer.json").write_text("[]")
    (hf / "generation_config.json").write_text("{}")
    open_initial(run, workdir)
    assert names(workdir / "hf") == ["config.json", "generation_config.json", "tokenizer.json"]
    assert (workdir / "hf" / "tokenizer.json").read_text() == "[]"
    assert open_initial(RunConfig(), workdir) is None
    assert kept_tokenizer(workdir) is None
    assert names(workdir) == [".hf.json"]


def test_what_others_put_there_is_left_alone(hf, workdir):
    kept = Path(shutil.copytree(hf, workdir / "hf"))  # where a user might well have put the download
    for init in ({"hf": str(kept)}, {"hf": str(hf)}, {}):
        with pytest.raises(
            ConfigError, match=f"{kept} is where a run keeps what came with its first weights"
        ):
            open_initial(run_of(hf, **init), workdir)
    assert names(kept) == names(hf)
    shutil.rmtree(kept)
    open_initial(run_of(hf, hf=str(hf)), workdir)
    (kept / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is where a run keeps"):
        open_initial(RunConfig(), workdir)
    assert (kept / "mine.txt").exists()


def test_the_tokenizer_that_a_run_trained_goes_on(hf, workdir, tmp_path):
    """With its own configuration for transformers, and without what belongs to the other one."""
    (hf / "chat_template.jinja").write_text("other")
    (hf / "generation_config.json").write_text("{}")
    import_checkpoint(hf, tmp_path / "ours")
    (tmp_path / "ours" / "data").mkdir()
    (tmp_path / "ours" / "data" / "tokenizer.json").write_text("[1]")
    open_initial(run_of(hf, checkpoint=str(tmp_path / "ours")), workdir)
    assert names(workdir / "hf") == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (workdir / "hf" / "tokenizer.json").read_text() == "[1]"


def test_every_field_that_differs_is_told_at_once(hf, workdir):
    run = run_of(hf, hf=str(hf))
    scaling = dataclasses.replace(run.model.rope_scaling, factor=20.0)
    run.model = dataclasses.replace(
        run.model, hidden_size=64, routed_scaling_factor=1.0, rope_scaling=scaling
    )
    with pytest.raises(ConfigError) as raised:
        open_initial(run, workdir)
    assert str(raised.value) == (
        f"model.hidden_size=64 differs from the 320 of {hf}: for that model use --config.model.hidden_size=320 "
        "--config.model.rope_scaling.factor=40 --config.model.routed_scaling_factor=2.5"
    )
    assert names(workdir) == []


def missing_chunk(state: Path) -> str:
    name = "model.lm_head.weight/c/0/0"
    (state / name).unlink()
    return f"state/{name} is missing, or not of 327,680 bytes"


def cut_chunk(state: Path) -> str:
    name = "model.moe_layers.mlp.experts.up_proj_scale_inv"
    chunk = next(path for path in (state / name).rglob("c/**/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-4])
    return f"state/{name}/c/.* is missing, or not of"


def empty_description(state: Path) -> str:
    (state / "model.norm.weight" / "zarr.json").write_text("{}")
    return "array model.norm.weight cannot be opened"


def missing_array(state: Path) -> str:
    shutil.rmtree(state / "model.norm.weight")
    return "array model.norm.weight cannot be opened"


def no_metadata(state: Path) -> str:
    (state / "_METADATA").write_text("{")
    return "_METADATA is no JSON"


@pytest.mark.parametrize("damage", [missing_chunk, cut_chunk, empty_description, missing_array, no_metadata])
def test_damage_to_an_imported_checkpoint_is_told_before_anything_is_made(hf, workdir, tmp_path, damage):
    import_checkpoint(hf, tmp_path / "ours")
    what = damage(tmp_path / "ours" / "checkpoints" / "0" / "state")
    with pytest.raises(
        ConfigError, match=f"^init.checkpoint: {tmp_path / 'ours'}/checkpoints/0 is damaged .*{what}"
    ):
        open_initial(run_of(hf, checkpoint=str(tmp_path / "ours")), workdir)
    assert names(workdir) == []


def test_damage_that_only_reading_finds_names_the_field(hf, workdir, tmp_path):
    import_checkpoint(hf, tmp_path / "ours")
    run = run_of(hf, checkpoint=str(tmp_path / "ours")).freeze()
    initial = open_initial(run, workdir)
    assert initial is not None
    (tmp_path / "ours/checkpoints/0/state/model.lm_head.weight/c/0/0").unlink()
    target = jax.eval_shape(lambda: Transformer(run.model, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=re.escape("make it again, or begin with another")) as raised:
        initial_model(run, initial, target)
    assert str(raised.value).startswith("init.checkpoint: checkpoint ")


def test_an_encoding_that_is_no_python(hf, workdir):
    (hf / "encoding").mkdir()
    (hf / "encoding" / "encoding.py").write_text("def (:")
    with pytest.raises(ConfigError, match=f"^init.hf: {hf / 'encoding' / 'encoding.py'} cannot be parsed"):
        open_initial(run_of(hf, hf=str(hf)), workdir)
    assert names(workdir) == []


def test_a_new_indexer_stands_in_the_kept_configuration(workdir, tmp_path):
    write_random(tmp_path / "v3", SMALL_CONFIG_V3)
    model = with_new_indexer(read_config(tmp_path / "v3")).model
    run = RunConfig(model=model, init=InitConfig(hf=str(tmp_path / "v3"), new_indexer=True))
    open_initial(run, workdir)
    assert json.loads((workdir / "hf" / "config.json").read_text())["index_topk"] == 2048
