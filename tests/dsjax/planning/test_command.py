"""What a plan's command line refuses, before it compiles anything."""

from pathlib import Path

import pytest

from dsjax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from dsjax.planning.chips import chip_of
from dsjax.planning.command import main
from dsjax.planning.shares import computed_shares


@pytest.mark.parametrize(
    ("topology", "flags", "said"),
    [
        ("v5p", [], "is not written like v5p:8x8x8"),
        ("v9:2x2", [], "'v9' is not known: use one of v5p"),
        ("v5p:3x3", [], "three numbers of chips, such as v5p:8x8x8"),
        ("v6e:2x2x2", [], "two numbers of chips, such as v6e:16x16"),
        ("v5p:0x2x2", [], "three numbers of chips"),
        ("0*v5p:2x2x1", [], "three numbers of chips"),
        ("h100:0", [], "GPUs are one number, such as h100:64"),
        ("h100:8x8", [], "GPUs are one number"),
        ("2*h100:8", [], "GPUs are one number"),
        ("h100:12", [], "12 GPUs are no number of nodes of 8"),
        ("v5p:2x2x1", ["--json=nowhere/plan.json"], "--json=nowhere/plan.json: there is no folder nowhere"),
        ("v5p:2x2x1", ["--hlo=nowhere/plan.txt"], "--hlo=nowhere/plan.txt: there is no folder nowhere"),
        ("v5p:2x2x1", ["--config.model.nothing=1"], "nothing"),
        ("v5p:2x2x1", ["surplus"], "'surplus' belongs to no flag"),
    ],
)
def test_one_sentence(capsys, tmp_path, monkeypatch, topology, flags, said):
    config = Path(__file__).parents[3] / "configs/tiny.py"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([f"--config={config}", f"--topology={topology}", *flags])
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert said in written.err
    assert len(written.err.strip().splitlines()) == 1


def test_rounds_that_a_plan_does_not_count_are_refused():
    config = RunConfig(model=ModelConfig(expert_capacity=0.5), mesh=MeshConfig(expert=8))
    with pytest.raises(ConfigError, match=r"model.expert_capacity=0.5 takes several rounds at even loads"):
        computed_shares(config, chip_of("v5p"), "train")
