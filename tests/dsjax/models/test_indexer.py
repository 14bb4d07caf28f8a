"""The lightning indexer against the V3.2-Exp report §2.1, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e4m3 import VALUES
from numerics import quick_jit, relative
from small_model import random_model, small_config, variables
from transcription import IndexerTranscription, float64
from visible import everyone

from dsjax.models.rope import rope_at
from dsjax.models.stack import layer_at
from pallas_kernels.indexer.api import index_scores

# The released widths of a head; YaRN, positions beyond the original context.
RELEASED_HEAD = {"qk_rope_head_dim": 64, "index_head_dim": 128, "max_position_embeddings": 163840}
FIRST_POSITION = 9000


def attention(precision: str, seed: int = 0, **changes):
    config = small_config(index_precision=precision, **changes)
    return layer_at(random_model(config, seed).moe_layers, 0).self_attn


def inputs(attn, length: int, seed: int = 0):
    """Hidden states, query latents, positions."""
    x = np.random.RandomState(seed).standard_normal((1, length, attn.config.hidden_size)).astype(np.float32)
    positions = FIRST_POSITION + np.arange(length, dtype=np.int32)[None]
    return x, np.asarray(attn.q_a_layernorm(attn.q_a_proj(jnp.asarray(x)))), positions


@quick_jit
def ours(attn, x, q_latent, positions):
    rope = rope_at(positions, attn.config)
    index = attn.indexer.query(x, q_latent, rope)
    key = attn.indexer.key(x, rope)
    visibility = everyone(*x.shape[:2], x.shape[1])
    return index.q, key, index.w, index_scores(index.q, key, index.w, visibility)


def transcription(attn, x, q_latent, positions) -> IndexerTranscription:
    parameters = {path: float64(variable) for path, variable in variables(attn.indexer)}
    x, q_latent = x[0].astype(np.float64), q_latent[0].astype(np.float64)
    return IndexerTranscription(attn.config, parameters, x, q_latent, positions[0])


@pytest.mark.parametrize("changes", [{}, RELEASED_HEAD], ids=["small", "released head"])
def test_plain_path(changes):
    attn = attention("plain", **changes)
    batch = inputs(attn, 150)
    expected = transcription(attn, *batch)
    q, k, w, scores = ours(attn, *batch)
    assert relative(q[0], expected.q) < 2e-6
    assert relative(k[0], expected.k) < 2e-6
    assert relative(w[0], expected.w * attn.config.index_head_dim**-0.5) < 2e-6
    assert relative(scores[0], expected.scores) < 2e-6


def nearest_to_halfway(unrounded: np.ndarray) -> float:
    """How near a value comes to the middle of two e4m3 neighbours, as a share of the largest in its head."""
    largest = np.abs(unrounded).max(-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(largest / 448))
    midpoints = (VALUES[1:] + VALUES[:-1]) / 2
    magnitude = (np.abs(unrounded) / scale)[..., None]
    return float(np.min(np.abs(magnitude - midpoints).min(-1) / (largest / scale)))


@pytest.mark.parametrize("seed", [7, 28, 33, 38])
def test_exact_path_gives_the_same_e4m3_values_bit_for_bit(seed):
    attn = attention("exact", seed, **RELEASED_HEAD)
    batch = inputs(attn, 4, seed)
    expected = transcription(attn, *batch)
    halfway = min(nearest_to_halfway(expected.unrounded_q), nearest_to_halfway(expected.unrounded_k))
    assert halfway > 2e-7, "float32 may round the other way: use another seed"
    q, k, _, scores = ours(attn, *batch)
    np.testing.assert_array_equal(np.asarray(q[0], np.float64), expected.q)
    np.testing.assert_array_equal(np.asarray(k[0], np.float64), expected.k)
    assert relative(scores[0], expected.scores) < 1e-6


def test_where_the_exact_path_rounds_the_other_way_the_value_was_halfway():
    """Among a million values float32 puts a few on the other side of a midpoint between e4m3 neighbours."""
    attn = attention("exact", **RELEASED_HEAD)
    batch = inputs(attn, 250)
    expected = transcription(attn, *batch)
    q, k, _, _ = ours(attn, *batch)
    for values, right, unrounded in (
        (q, expected.q, expected.unrounded_q),
        (k, expected.k, expected.unrounded_k),
    ):
        values = np.asarray(values[0], np.float64)
        differs = values != right
        assert differs.mean() < 5e-5
        midpoint = (values + right)[differs] / 2
        largest = np.abs(unrounded).max(-1, keepdims=True) * np.ones_like(unrounded)
        assert np.all(np.abs(unrounded[differs] - midpoint) < 2e-7 * largest[differs])


def test_the_exact_path_is_near_the_plain_one_and_not_equal():
    plain, exact = attention("plain", **RELEASED_HEAD), attention("exact", **RELEASED_HEAD)
    batch = inputs(plain, 100)
    difference = relative(ours(exact, *batch)[3], ours(plain, *batch)[3])
    assert 1e-3 < difference < 0.1


def test_a_negative_head_weight_makes_scores_negative():
    """The ReLU is on the products alone; an activation on w would lose half of the scores."""
    attn = attention("plain")
    x, q_latent, positions = inputs(attn, 80)
    positive = jax.tree.map(lambda v: v, attn)
    positive.indexer.weights_proj.weight[...] = jnp.abs(attn.indexer.weights_proj.weight[...])
    _, _, w, scores = ours(positive, np.abs(x), q_latent, positions)
    _, _, opposite_w, opposite = ours(positive, -np.abs(x), q_latent, positions)
    assert np.all(np.asarray(w) > 0)
    assert np.all(np.asarray(opposite_w) < 0)
    assert np.all(np.asarray(scores) >= 0)
    assert np.all(np.asarray(opposite) <= 0)
    assert np.min(opposite) < -1e-3


@pytest.mark.parametrize("precision", ["plain", "exact"])
def test_selection_is_the_best_scores_among_the_visible(precision):
    """Two documents, the second three times the length of the selection, and padding."""
    attn = attention(precision)
    length, k = 300, attn.config.index_topk
    x, q_latent, positions = inputs(attn, length)
    segments = np.repeat([1, 2, 0], [90, 200, 10])[None].astype(np.int32)
    expected = transcription(attn, x, q_latent, positions).scores
    if precision == "exact":
        expected = np.asarray(ours(attn, x, q_latent, positions)[3][0])  # held to the transcription above
    indices = quick_jit(lambda a, x, p, s: a.selected(x, rope_at(p, a.config), s))(
        attn, x, positions, segments
    )
    indices = np.asarray(indices[0])
    for t in range(length):
        visible = np.flatnonzero((segments[0, : t + 1] == segments[0, t]) & (segments[0, t] != 0))
        chosen = indices[t][indices[t] >= 0]
        assert np.all(np.diff(chosen) > 0)
        assert np.isin(chosen, visible).all()
        assert chosen.size == min(k, visible.size)
        left = np.setdiff1d(visible, chosen)
        if left.size:
            rounding = 1e-6 * np.abs(expected[t, visible]).max()
            assert expected[t, chosen].min() >= expected[t, left].max() - rounding


def test_the_indexer_sends_no_gradient_into_its_inputs():
    attn = attention("exact")
    x, q_latent, positions = inputs(attn, 70)

    def total(attn, x, q_latent):
        rope = rope_at(jnp.asarray(positions), attn.config)
        index, key = attn.indexer.query(x, q_latent, rope), attn.indexer.key(x, rope)
        return jnp.sum(index.q**3) + jnp.sum(index.w**3) + jnp.sum(key**3)

    d_attn, d_x, d_q_latent = quick_jit(jax.grad(total, argnums=(0, 1, 2)))(attn, x, q_latent)
    assert not np.any(d_x)
    assert not np.any(d_q_latent)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(d_attn.indexer))
