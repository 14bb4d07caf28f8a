"""FLOPs a token against the published count of active parameters, and against compiled matrix products."""

import pytest

from dsjax.config import presets
from dsjax.observe.model_flops import active_matmul_params, decode_flops_per_token, train_flops_per_token


def test_active_parameters_are_the_published_ones():
    v3, v32 = presets.deepseek_v3_671b(), presets.deepseek_v32_671b()
    v3.num_nextn_predict_layers = v32.num_nextn_predict_layers = 0
    assert active_matmul_params(v3) == pytest.approx(36.63e9, rel=1e-3)
    indexer_without_its_norm = 13_959_424 - 256
    assert active_matmul_params(v32) - active_matmul_params(v3) == 61 * indexer_without_its_norm


def test_attention_counts_selected_pairs_only():
    config = presets.deepseek_v32_671b()
    config.num_nextn_predict_layers = 0
    matmuls = 6 * active_matmul_params(config)
    attended = (2048 * 2049 / 2 + (131_072 - 2048) * 2048) / 131_072
    # Scores of all pairs forward, gradients of those that the loss is of.
    indexer = 2 * 64 * 128 * ((131_072 + 1) / 2 + 2 * attended)
    expected = matmuls + 61 * (3 * 128 * 2 * (576 + 512) * attended + indexer)
    assert train_flops_per_token(config, 131_072) == pytest.approx(expected, rel=1e-6)
    config.dense_attention_max_length = 131_072  # in MHA form
    expected += 61 * 3 * 128 * 2 * (192 + 128 - 576 - 512) * attended
    assert train_flops_per_token(config, 131_072) == pytest.approx(expected, rel=1e-6)


def test_a_decoded_token():
    """The head's products and the layers', all keys' index scores, attention to 2,048 latents of 576 and 512."""
    config = presets.deepseek_v32_671b()
    weights = active_matmul_params(presets.deepseek_v32_671b())
    weights -= 13_959_424 - 256 + _without_indexer_mtp()
    attention = 61 * (2 * 128 * (576 + 512) * 2048 + 2 * 64 * 128 * 131_072)
    assert decode_flops_per_token(config, 131_072) == pytest.approx(2 * weights + attention, rel=1e-6)


def _without_indexer_mtp() -> int:
    """Weights of the MTP module, its head included, but for the indexer."""
    with_it, without = presets.deepseek_v3_671b(), presets.deepseek_v3_671b()
    without.num_nextn_predict_layers = 0
    return active_matmul_params(with_it) - active_matmul_params(without)


def test_without_an_indexer_every_causal_pair_counts():
    config = presets.deepseek_v3_671b()
    config.num_nextn_predict_layers = 0
    attention = train_flops_per_token(config, 4096) - 6 * active_matmul_params(config)
    assert attention == pytest.approx(3 * 61 * 128 * 2 * (192 + 128) * 4097 / 2, rel=1e-9)
