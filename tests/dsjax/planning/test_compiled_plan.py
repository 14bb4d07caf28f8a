"""A step of the released model's shape, smaller, through the TPU compiler: what it computes, sends and stores.

Needs libtpu, in a virtual environment of its own: where it is installed, jax looks for a TPU.
"""

import dataclasses
import importlib.util
import re

import pytest

from dsjax.config import MeshConfig, RunConfig, presets
from dsjax.observe.model_flops import active_matmul_params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]
SMALLER = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": 384,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "index_n_heads": 16,
    "max_position_embeddings": 4096,
}


def smaller(sequences: int = 8, **mesh: int) -> RunConfig:
    config = RunConfig(model=dataclasses.replace(presets.deepseek_v32_671b(), **SMALLER))
    config.train.batch_size, config.train.sequence_length = sequences, 4096
    config.optimizer.moment_dtype = "bfloat16"
    config.mesh = MeshConfig(**mesh)
    return config.freeze()


def expected_flops(config: RunConfig) -> float:
    """Of the whole batch: ``6 · active · tokens``, attention, and what remat=layer computes again."""
    model, tokens = config.model, config.train.batch_size * config.train.sequence_length
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    heads, width, value = model.num_attention_heads, model.qk_head_dim, model.v_head_dim
    index = model.index_n_heads * model.index_head_dim
    again = model.q_lora_rank * (heads * width + index)  # q_b_proj and wq_b
    again += model.kv_lora_rank * heads * (model.qk_nope_head_dim + value)
    experts = model.num_experts_per_tok * model.hidden_size * model.moe_intermediate_size
    recomputed = 2 * (layers * again + (model.num_moe_layers + 1) * 2 * experts)  # gate and up
    # Four stretches of queries, each with the keys up to its end: 10 of 16 pairs.
    pairs = config.train.sequence_length * 10 / 16
    attention = (width + value) + (2 * width + value) + (2 * width + 2 * value)  # forward, dq, dkv
    target = 2 * width  # of the indexer's loss, forward and again
    scores = 6 * index  # forward, again, and two products for each gradient
    return tokens * (
        6 * active_matmul_params(model)
        + recomputed
        + layers * 2 * pairs * (heads * (attention + target) + scores)
    )


@pytest.fixture(scope="module")
def plan():
    from dsjax.planning.command import planned

    return planned(smaller(fsdp=2, expert=4), "v5p:2x2x2")[0]


def test_nothing_more_is_computed_than_the_formula_says(plan):
    """No silent dense experts, no masked pairs, no layer computed twice."""
    assert plan.flops * plan.devices == pytest.approx(expected_flops(smaller(fsdp=2, expert=4)), rel=0.1)


def test_nothing_is_brought_together(plan):
    assert not plan.findings
    kinds = {collective.kind for collective in plan.collectives}
    assert "ragged-all-to-all" in kinds
    assert plan.fits
    assert plan.memory.parameters * plan.devices == pytest.approx(4 * parameters(), rel=0.01)
    assert plan.memory.activations > 0
    assert plan.memory.gradients > 0


def parameters() -> int:
    import jax
    from flax import nnx

    from dsjax.models.transformer import Transformer

    model = jax.eval_shape(lambda: Transformer(smaller(fsdp=2, expert=4).model, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(model))


def test_only_loops_of_experts_depend_on_data(plan):
    assert all("shard_map/while" in loop for loop in plan.loops)


def test_too_much_is_said_in_a_sentence(tmp_path, capsys):
    from dsjax.planning.command import main

    config = tmp_path / "large.py"
    config.write_text(
        "import dataclasses\nfrom dsjax.config import MeshConfig, RunConfig, presets\n"
        f"def get_config():\n    model = dataclasses.replace(presets.deepseek_v32_671b(), **{SMALLER})\n"
        "    return RunConfig(model=model, mesh=MeshConfig(expert=4))\n"
    )
    with pytest.raises(SystemExit) as end:
        main([f"--config={config}", "--topology=v5p:2x2x1", "--config.train.batch_size=1024"])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert re.search(r"does not fit: \d+ of 95 GiB, largest: temporaries", said), said


def test_a_decoding_step():
    from dsjax.planning.command import planned

    plan = planned(smaller(sequences=64, fsdp=2, expert=4), "v5p:2x2x2", "decode")[0]
    assert plan.fits
    assert not plan.findings
    assert plan.memory.cache == pytest.approx(64 / 8 * 4096 * (512 + 64 + 128) * 2 * 4, rel=0.01)
