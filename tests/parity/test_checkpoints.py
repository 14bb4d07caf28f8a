"""Weights from transformers to us and back, through files."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from numerics import relative  # noqa: E402
from replica import SMALL_CONFIG, dequantised, write_random  # noqa: E402
from small_model import logits_of, random_model, random_tokens, seed_with_margin, small_config  # noqa: E402
from transformers_model import hf_model  # noqa: E402

from dsjax.checkpoint.hf_checkpoint import open_sound_checkpoint  # noqa: E402
from dsjax.checkpoint.hf_export import export_checkpoint  # noqa: E402
from dsjax.checkpoint.hf_import import import_checkpoint  # noqa: E402
from dsjax.checkpoint.hf_load import load_arrays  # noqa: E402
from dsjax.checkpoint.store import CheckpointStore, from_named_leaves, named_leaves, placed  # noqa: E402
from dsjax.models.transformer import Transformer  # noqa: E402

pytestmark = pytest.mark.parity

LENGTH = 300
FAMILIES = {
    "V3.2": {},
    "V3": {"index_topk": 0, "rms_norm_eps": 1e-2},
    "V3.2 with YaRN": {"max_position_embeddings": 163840},
}


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request, tmp_path_factory):
    """A model of transformers with random weights, its directory, and tokens that select without a tie."""
    config = small_config(**FAMILIES[request.param], attention_block_size=LENGTH)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    seed = seed_with_margin(config, (1, LENGTH), 4e-6, positions, 0) if config.has_indexer else 0
    model = hf_model(random_model(config, seed))
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory, max_shard_size="2MB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return model, directory, random_tokens(config, (1, LENGTH), seed)


def their_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def abstract(directory) -> Transformer:
    config = dataclasses.replace(
        open_sound_checkpoint(directory).config.model, compute_dtype="float32"
    ).freeze()
    return jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def test_imported_logits_are_theirs(theirs, tmp_path):
    model, directory, tokens = theirs
    import_checkpoint(directory, tmp_path / "ours")
    store = CheckpointStore(tmp_path / "ours", keep=None)
    ours = store.restore_part(0, abstract(directory), prefix="model")
    store.close()
    difference = relative(np.asarray(logits_of(ours, tokens)), their_logits(model, tokens))
    assert difference < 2e-4


def test_directly_loaded_logits_are_theirs(theirs):
    model, directory, tokens = theirs
    target = abstract(directory)
    arrays = dict(load_arrays(open_sound_checkpoint(directory), placed(named_leaves(target))))
    ours = from_named_leaves(target, arrays)
    difference = relative(np.asarray(logits_of(ours, tokens)), their_logits(model, tokens))
    assert difference < 2e-4


def test_exported_weights_are_theirs_bit_for_bit(theirs, tmp_path):
    model, directory, tokens = theirs
    import_checkpoint(directory, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", shard_bytes=2_000_000)
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(back) is type(model)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    assert np.array_equal(their_logits(back, tokens), their_logits(model, tokens))


def test_bfloat16_weights_come_back_bit_for_bit(theirs, tmp_path):
    _, directory, _ = theirs
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    import_checkpoint(tmp_path / "bfloat16", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name


def test_fp8_exports_load_in_transformers(tmp_path):
    """Whose own dequantisation knows no partial blocks: every width is a multiple of 128."""
    widths = {"hidden_size": 256, "q_lora_rank": 128, "kv_lora_rank": 112, "moe_intermediate_size": 128}
    widths |= {"num_attention_heads": 8, "num_key_value_heads": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    write_random(tmp_path / "hf", SMALL_CONFIG | widths | {"index_n_heads": 4, "index_head_dim": 128})
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", dtype="fp8")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        dtype=torch.float32,
    )
    expected = dequantised(tmp_path / "hf")
    for name, value in back.state_dict().items():
        if ".experts." in name:
            prefix, kind = name.rsplit(".", 1)
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            theirs = [[expected[f"{prefix}.{e}.{each}.weight"] for each in kinds] for e in range(len(value))]
            wanted = np.stack([np.concatenate(parts) for parts in theirs])
        else:
            wanted = expected[name]
        np.testing.assert_array_equal(value.float().numpy(), wanted, name)
