"""Multi-token prediction against the V3 report §2.2, composed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import random_model, random_tokens, small_config, variables
from transcription import float64, rms_norm

from dsjax.models.rope import rope_at

LENGTH = 150
SEGMENTS = np.repeat([1, 2, 0], [40, 100, 10])[None].astype(np.int32)
POSITIONS = np.arange(LENGTH, dtype=np.int32)[None] + 7


def mtp_model(**changes):
    """All keys selected: near-ties among scores are no matter of this file."""
    changes |= {"num_nextn_predict_layers": 1, "index_topk": LENGTH, "attention_block_size": LENGTH}
    return random_model(small_config(**changes))


@pytest.fixture(scope="module")
def inputs():
    """A hidden state, and t_{i+1} for every i."""
    hidden = 3 * np.random.RandomState(0).standard_normal((1, LENGTH, 128)).astype(np.float32)
    return hidden, random_tokens(small_config(), (1, LENGTH + 1))[:, 1:]


@quick_jit
def predict(model, hidden, next_tokens):
    return model.predict_second_next(hidden, next_tokens, POSITIONS, SEGMENTS, with_indexer_loss=True)


@quick_jit
def run_layer(layer, x, config_of):
    return layer(x, rope_at(POSITIONS, config_of.config), SEGMENTS, with_indexer_loss=True)[:2]


@pytest.mark.parametrize("mtp_input", ["before_final_norm", "after_final_norm"])
def test_composition(inputs, mtp_input):
    hidden, next_tokens = inputs
    model = mtp_model(mtp_input=mtp_input)
    mtp = model.mtp
    h = hidden.astype(np.float64)
    if mtp_input == "after_final_norm":
        h = rms_norm(h, float64(model.norm.weight))
    embedding = float64(model.embed_tokens)[next_tokens]
    pair = [rms_norm(embedding, float64(mtp.enorm.weight)), rms_norm(h, float64(mtp.hnorm.weight))]
    x = np.concatenate(pair, axis=-1) @ float64(mtp.eh_proj.weight)
    y, layer_stats = run_layer(mtp.layer, x.astype(np.float32), model)
    expected = rms_norm(np.asarray(y, np.float64), float64(mtp.norm.weight))
    result, stats = predict(model, hidden, next_tokens)
    assert relative(result, expected) < 1e-5
    assert relative(stats.indexer_kl, layer_stats.indexer_kl) < 1e-4
    np.testing.assert_array_equal(stats.moe.load, layer_stats.moe.load)
    assert np.sum(stats.moe.load) == 4 * np.sum(SEGMENTS != 0)


def test_the_layer_has_everything_a_layer_of_the_main_model_has(inputs):
    """Attention, indexer and experts, all of which learn."""
    hidden, next_tokens = inputs
    model = mtp_model()

    def loss(model):
        result, stats = predict.__wrapped__(model, hidden, next_tokens)
        logits = model.lm_head(result, out_dtype=jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0]) + jnp.sum(stats.indexer_kl)

    gradient = dict(variables(quick_jit(jax.grad(loss))(model)))
    own = {"mtp.enorm.weight", "mtp.hnorm.weight", "mtp.eh_proj.weight", "mtp.norm.weight"}
    layer = {f"mtp.layer.{path}" for path, _ in variables(model.moe_layers)}
    shared = {"embed_tokens", "lm_head.weight"}
    learning = {path for path, variable in gradient.items() if np.any(variable[...])}
    assert {path for path in gradient if path.startswith("mtp.")} == own | layer
    assert learning == (own | layer | shared) - {"mtp.layer.mlp.gate.e_score_correction_bias"}


def test_a_model_without_the_module_says_so():
    model = random_model(small_config())
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        model.predict_second_next(jnp.zeros((1, 3, 128)), jnp.zeros((1, 3), jnp.int32))
